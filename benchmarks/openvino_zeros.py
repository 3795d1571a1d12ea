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
    """Products after each other, with the smallest weights of every row set to zero."""
    ov, ops = importlib.import_module("openvino"), importlib.import_module("openvino.opset13")
    generator = np.random.default_rng(0)
    hidden, ffn = arguments.hidden, arguments.ffn
    outputs = start = ops.parameter([arguments.inputs, hidden], np.float32)
    low, high = (ops.constant(np.float32(value)) for value in (-4, 4 * 127 / 128))
    for rows, columns in [(ffn, hidden), (hidden, ffn)] * arguments.pairs:
        weight = generator.normal(size=(rows, columns)).astype(np.float32) / columns**0.5
        smallest = np.argsort(abs(weight), axis=1)[:, : int(sparsity * columns)]
        np.put_along_axis(weight, smallest, 0, axis=1)
        scale = abs(weight).max(axis=1, keepdims=True) / 127
        whole = ops.constant(np.rint(weight / scale).astype(np.int8))
        inputs = ops.fake_quantize(outputs, low, high, low, high, 256)
        outputs = ops.matmul(
            inputs, ops.multiply(ops.convert(whole, np.float32), ops.constant(scale)), False, True
        )
    return ov.Model([ops.result(outputs)], [start])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """How many times as fast as dense each row is, by the medians."""
    medians = [statistics.median(row["seconds"]) for row in rows]
    shown = [
        (f"{row['sparsity']:.0%}", "yes" if row["option"] else "no", f"{medians[0] / median:.2f}x")
        for row, median in zip(rows, medians, strict=True)
    ]
    return markdown_lines(("zeros", "option", "speed"), shown)


def main() -> None:
    helps = {
        "hidden": "hidden size",
        "ffn": "size of the MLP",
        "pairs": "MLPs",
        "inputs": "tokens at once",
    }
    numbers = {"hidden": 1024, "ffn": 2816, "pairs": 12, "inputs": 1, "rounds": 60}
    arguments = parse_arguments(
        __doc__, helps=helps, **numbers, output=Path("runs/openvino_zeros.json")
    )
    ov = importlib.import_module("openvino")
    rows: list[dict[str, Any]] = []
    networks, tokens = (
        [],
        np.random.default_rng(1).normal(size=(arguments.inputs, arguments.hidden)),
    )
    for sparsity in (0.0, 0.5, 0.7, 0.8):
        model = network(arguments, sparsity)
        for option in (False, True) if sparsity else (False,):
            more = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": sparsity - 0.05} if option else {}
            networks.append(ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1} | more))
            rows.append({"sparsity": sparsity, "option": option, "seconds": []})
        if sparsity and not np.array_equal(
            *(found(tokens.astype(np.float32))[0] for found in networks[-2:])
        ):
            raise SystemExit("the option changes what is computed")
    for _ in range(arguments.rounds):
        for row, found in zip(rows, networks, strict=True):
            started = time.process_time()
            found(tokens.astype(np.float32))
            row["seconds"].append(round(time.process_time() - started, 6))
    print("\n".join(table(rows)))
    save(
        arguments,
        {"machine": {"processor": processor_name(), "openvino": ov.__version__}, "rows": rows},
    )


if __name__ == "__main__":
    main()
