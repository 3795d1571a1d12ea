"""Matrix products of OpenVINO with 8-bit weights and inputs: dense, with zeros, and with OpenVINO's option for zeros.

The matrices have the sizes of an MLP: several pairs, up and down, one after another. The option
`CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE` needs a processor with AMX. Times are processor time on one thread.

    pip install openvino
    python benchmarks/openvino_zeros.py --output runs/openvino_zeros.json
"""

from __future__ import annotations

import importlib
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from shared import parse_arguments, save

from optimum_fista.environment import processor_name
from optimum_fista.folder.card import markdown_lines


def network(arguments: Any, sparsity: float) -> Any:
    """Make a network of products after each other, with the smallest weights of every row set to zero.

    Weights and inputs are quantized to 8 bits. `arguments` are those of the command.
    """
    ov = importlib.import_module("openvino")
    ops = importlib.import_module("openvino.opset13")
    generator = np.random.default_rng(0)
    hidden = arguments.hidden
    ffn = arguments.ffn
    start = ops.parameter([arguments.inputs, hidden], np.float32)
    # The range of the inputs: 256 steps, of which one is zero.
    low = ops.constant(np.float32(-4))
    high = ops.constant(np.float32(4 * 127 / 128))
    outputs = start
    for rows, columns in [(ffn, hidden), (hidden, ffn)] * arguments.pairs:
        weight = generator.normal(size=(rows, columns)).astype(np.float32) / columns**0.5
        smallest = np.argsort(abs(weight), axis=1)[:, : int(sparsity * columns)]
        np.put_along_axis(weight, smallest, 0, axis=1)
        scale = abs(weight).max(axis=1, keepdims=True) / 127
        whole = ops.constant(np.rint(weight / scale).astype(np.int8))
        dequantized = ops.multiply(ops.convert(whole, np.float32), ops.constant(scale))
        inputs = ops.fake_quantize(outputs, low, high, low, high, 256)
        outputs = ops.matmul(inputs, dequantized, False, True)  # the second one is transposed
    return ov.Model([ops.result(outputs)], [start])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Say how many times as fast as dense each row is, by the medians."""
    medians = [statistics.median(row["seconds"]) for row in rows]
    dense = medians[0]
    lines = []
    for row, median in zip(rows, medians, strict=True):
        option = "yes" if row["option"] else "no"
        lines.append((f"{row['sparsity']:.0%}", option, f"{dense / median:.2f}x"))
    return markdown_lines(("zeros", "option", "speed"), lines)


def main() -> None:
    """Time all networks in turn, print the table, and write the record."""
    helps = {
        "hidden": "hidden size",
        "ffn": "size of the MLP",
        "pairs": "MLPs",
        "inputs": "tokens at once",
    }
    arguments = parse_arguments(
        __doc__,
        helps=helps,
        hidden=1024,
        ffn=2816,
        pairs=12,
        inputs=1,
        rounds=60,
        output=Path("runs/openvino_zeros.json"),
    )
    ov = importlib.import_module("openvino")
    shape = (arguments.inputs, arguments.hidden)
    tokens = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    rows: list[dict[str, Any]] = []
    networks = []
    for sparsity in (0.0, 0.5, 0.7, 0.8):
        model = network(arguments, sparsity)
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1}
        networks.append(ov.compile_model(model, "CPU", settings))
        rows.append({"sparsity": sparsity, "option": False, "seconds": []})
        if sparsity:
            settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = sparsity - 0.05
            networks.append(ov.compile_model(model, "CPU", settings))
            rows.append({"sparsity": sparsity, "option": True, "seconds": []})
            without, with_option = (compiled(tokens)[0] for compiled in networks[-2:])
            if not np.array_equal(without, with_option):
                raise SystemExit("the option changes what is computed")

    for _ in range(arguments.rounds):
        for row, compiled in zip(rows, networks, strict=True):
            started = time.process_time()
            compiled(tokens)
            row["seconds"].append(round(time.process_time() - started, 6))
    print("\n".join(table(rows)))
    machine = {"processor": processor_name(), "openvino": ov.__version__}
    save(arguments, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
