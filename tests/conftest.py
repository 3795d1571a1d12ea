"""Every test runs on one thread: the tensors are tiny, and results do not depend on the machine."""

import torch

torch.set_num_threads(1)
