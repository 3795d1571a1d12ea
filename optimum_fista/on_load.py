"""Prune a model while Transformers loads it, as other packages quantize it there.

The user passes a `FistaOnLoadConfig` to `from_pretrained`. Transformers makes a `FistaOnLoadQuantizer` of it, and calls
that before and after the weights are read. Importing this module registers a quantizer with Transformers, because this
is its only interface for changes of a model that has just been loaded. Nothing is quantized, and the model keeps
neither this configuration nor the quantizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_fista.pruner import FistaPruner
from optimum_fista.removal.planning import refuse_tokens_removal
from optimum_fista.source.loading import require_tokenizer
from optimum_fista.text.calibration_tokens import calibration_tokens, usual_length
from optimum_fista.text.sources import require_source


class FistaOnLoadConfig(QuantizationConfigMixin):
    """Prune a model in `from_pretrained(quantization_config=)`, with the result of `pruner.prune`.

    The loaded model has no `quantization_config`. `pruner.result` and `pruner.save_pretrained` take it.

    Args:
        pruner: What prunes, with its `FistaPruningConfig`.
        dataset: `"self"` (the model writes its own text) or another source of `calibration_tokens`, such as a file or
            a data set of the Hub; a list of texts, of which each is a sequence; or batches of token ids, as for
            `prune`.
        tokenizer: The tokenizer or its name; `None`: the model's.
        num_samples: Sequences to sample or draw if `dataset` names a source.
        sequence_length: Their tokens, and the most tokens of a text; `None`: 2048, or the model's maximum.
    """

    quant_method: Any = "fista_pruning"

    def __init__(
        self,
        pruner: FistaPruner,
        dataset: str | Iterable[Any] = "self",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        num_samples: int = 128,
        sequence_length: int | None = None,
    ) -> None:
        """Keep the arguments as they are.

        ValueError for a name of a `dataset` that is not known, and for a pruner that removes tokens, which needs files.

        `pruner` prunes the model when it is loaded. `dataset` is the name or path of a text, a list of texts, or
        batches of token ids. `tokenizer` may be its name; `None` stands for the model's. If `dataset` names a text,
        `num_samples` sequences are taken from it. `sequence_length` is in tokens; `None` stands for the usual length of
        the model.
        """
        refuse_tokens_removal(pruner.config)
        if isinstance(dataset, str) and dataset != "self":
            require_source(dataset)
        self.pruner = pruner
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        # Whether `dataset` is a list of texts. Other iterables hold batches: to look into them would use them up.
        self.has_texts = isinstance(dataset, list | tuple) and all(
            isinstance(text, str) for text in dataset
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FistaOnLoadConfig:
        """Transformers copies a model's configuration; pruner and text are the caller's."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Values for the configuration of the model, which holds them only while the model is built."""
        return {"quant_method": self.quant_method}


@register_quantizer(FistaOnLoadConfig.quant_method)
class FistaOnLoadQuantizer(HfQuantizer):
    """Prunes a model that has been loaded; Transformers calls it a quantizer, but nothing is rounded."""

    quantization_config: FistaOnLoadConfig

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **_: Any) -> None:
        """Find the tokenizer before the weights are read; this takes the option off the model's configuration.

        `self.quantization_config` is the user's `FistaOnLoadConfig`. The tokenizer is kept in `self._tokenizer`; if
        batches of token ids were passed, it is not needed and its name stays there. A tokenizer of the Hub is
        downloaded into its cache. The weights of `model` are not read yet; `dtype` and others are what Transformers
        passes to quantizers.
        """
        # So that the model is not saved as a quantized one.
        del model.config.quantization_config
        options = self.quantization_config
        self._tokenizer: Any = options.tokenizer
        if not options.tokenizer:
            self._tokenizer = model.name_or_path  # the tokenizer has the name of the model
        is_text = options.has_texts or isinstance(options.dataset, str)
        if is_text and isinstance(self._tokenizer, str):
            self._tokenizer = require_tokenizer(self._tokenizer)

    def postprocess_model(self, model: PreTrainedModel, **_: Any) -> None:
        """Prune the model in place after its weights have been read; this takes the quantizer off the model.

        `self.quantization_config` is the user's `FistaOnLoadConfig`, whose pruner keeps the report and the masks.
        `self._tokenizer` was found by `preprocess_model`. A text of the Hub is downloaded into its cache.
        """
        # So that the model is not saved as a quantized one.
        del model.hf_quantizer
        options = self.quantization_config
        pruner = options.pruner
        length = options.sequence_length
        if not length:
            length = usual_length(model.config)
        source_name: str | None = None
        batches: Iterable[Any]
        if isinstance(options.dataset, str):
            source_name = options.dataset
            tokens = calibration_tokens(
                source_name,
                model,
                self._tokenizer,
                options.num_samples,
                length,
                pruner.config.seed,
                progress=pruner.progress,
            )
            batches = tokens.split(1)  # one sequence in each batch
        elif options.has_texts:
            batches = [
                self._tokenizer(text, truncation=True, max_length=length)["input_ids"]
                for text in options.dataset
            ]
        else:
            batches = options.dataset
        pruner.prune(model, batches, calibration_source=source_name)

    def is_serializable(self) -> bool:  # noqa: D102
        return True

    @property
    def is_trainable(self) -> bool:  # noqa: D102
        return True
