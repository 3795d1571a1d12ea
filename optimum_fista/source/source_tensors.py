"""Tensors of a model folder as they are stored: their bytes are copied from file to file, without a model.

A folder may hold tensors that the loaded class has no place for: layers that predict more tokens (`mtp.*`, or decoder
layers beyond `num_hidden_layers`), buffers, unknown names. Other programs use them, so a pruned folder gets them too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from optimum_fista.folder.atomic import digest_of, write_file
from optimum_fista.folder.checkpoint import CONFIG_FILE, PACKED_KEY, checkpoint_files, read_json
from optimum_fista.model.layers import find_decoder_layers
from optimum_fista.packed.format import SUFFIXES, packed_names
from optimum_fista.removal.parts import Part
from optimum_fista.source.formats.dequantization import DENSE, Dequantizer, dequantizer_of

T = TypeVar("T")
# of activations that were quantized, too: a model in 16 bits has none
_ACTIVATION_SCALES = re.compile(r"\.(input|output|q|k|v)_(scale|global_scale|zero_point)$")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_PIECE = 2**24  # bytes that are copied at a time
_LOSES = "parts that decoder layers lose would have to go there too"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes stay where they are until they are written."""

    dtype: str  # as safetensors writes it, such as "BF16" or "F8_E4M3"
    shape: tuple[int, ...]
    num_bytes: int
    pieces: Callable[[], Iterator[bytes | memoryview]]  # reads the bytes, in rows

    @classmethod
    def of(cls, tensor: Tensor, read: Callable[[], Tensor] | None = None) -> StoredTensor:
        """Describe a tensor in memory; or one on the meta device, which `read` reads."""

        def pieces() -> Iterator[bytes | memoryview]:
            yield (
                (read or (lambda: tensor))()
                .cpu()
                .contiguous()
                .view(-1)
                .view(torch.uint8)
                .numpy()
                .data
            )

        empty = save({"": tensor.new_empty(0, device="cpu")})
        return cls(json.loads(empty[8:])[""]["dtype"], tuple(tensor.shape), tensor.nbytes, pieces)

    def tensor(self) -> Tensor:
        """Read it into memory."""
        return load(b"".join(_file_of({"": self})))[""]

    def selected(self, axis: int, entries: Tensor) -> StoredTensor:
        """The same tensor with only these entries of an axis; it is read whole when it is written."""
        shape = (*self.shape[:axis], len(entries), *self.shape[axis + 1 :])

        def pieces() -> Iterator[bytes | memoryview]:
            values = torch.frombuffer(bytearray().join(self.pieces()), dtype=torch.uint8).view(
                *self.shape, -1
            )
            yield values.index_select(axis, entries).view(-1).numpy().data

        return replace(
            self,
            shape=shape,
            num_bytes=self.num_bytes // self.shape[axis] * len(entries),
            pieces=pieces,
        )

    def holding(self, value: Tensor) -> StoredTensor:
        """Describe a new value in this tensor's dtype; if the old one is rounded to it, nothing has changed."""
        new = StoredTensor.of(value)
        if self.dtype == new.dtype or not {self.dtype, new.dtype} <= DENSE:
            return new
        old = self.tensor()
        if self.shape == new.shape and torch.equal(old.to(value.dtype), value):
            return self
        return StoredTensor.of(value.to(old.dtype))

    def equals(self, other: StoredTensor) -> bool:
        """Compare dtypes, shapes and all bytes."""
        return self._digest() == other._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.dtype} {self.shape}".encode())
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


def read_stored(source: Path) -> dict[str, StoredTensor]:
    """All tensors in the weight files of a model folder, packed or not; of a GGUF file none. Only headers are read."""
    found: dict[str, StoredTensor] = {}
    for file in sorted(weight_files(source)):
        for name, tensor in (_binary if file.suffix == ".bin" else _safetensors)(file):
            if name in found and not tensor.equals(found[name]):
                why = f"twice, with different values: {file.name} is the second file with it"
                raise ValueError(
                    f"model={str(source)!r} holds {name} {why}. Delete the wrong one from its file."
                )
            found[name] = tensor
    return found


def weight_files(source: Path) -> set[Path]:
    """The weight files of a model folder that Transformers loads."""
    binary, index = source / "pytorch_model.bin", source / "pytorch_model.bin.index.json"
    for stem in ("model", "packed"):
        with suppress(FileNotFoundError):
            return {*checkpoint_files(source, stem).values()}
    if index.exists() and not binary.exists():
        return {source / name for name in read_json(index)["weight_map"].values()}
    return {binary} if binary.exists() else set()


@dataclass(frozen=True)
class SourceTensors:
    """The tensors in a model's files: those that its class loads, and the others, which are copied as they are."""

    stored: Mapping[str, StoredTensor] = field(default_factory=dict)  # by name
    places: Mapping[str, str] = field(
        default_factory=dict
    )  # the tensors of the model as which they are loaded
    others: Mapping[str, str] = field(
        default_factory=dict
    )  # not loaded; each with its module, for people
    lost: Mapping[str, str] = field(
        default_factory=dict
    )  # modules that are not copied, with the reason
    layers: str = ""  # what names begin with, before the number of a decoder layer
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the configuration says of quantized weights

    @property
    def unplaced(self) -> dict[str, StoredTensor]:
        """The tensors that are not loaded, and are copied."""
        return {
            name: self.stored[name]
            for name, module in self.others.items()
            if module not in self.lost
        }

    def loaded_in(self, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """The tensors that are loaded; none if `dtype` is not that of most, so that somebody asked for another one."""
        placed, sizes = (
            {name: self.stored[name] for name in self.places if name in self.stored},
            Counter[str](),
        )
        for tensor in placed.values():
            sizes[tensor.dtype] += math.prod(tensor.shape) * (tensor.dtype in DENSE)
        usual = StoredTensor.of(torch.empty(0, dtype=dtype)).dtype
        return placed if sizes[usual] == max(sizes.values(), default=0) else {}

    @property
    def copied(self) -> dict[str, int]:
        """How many tensors of each module are copied; modules of all decoder layers are one entry."""
        return dict(Counter(re.sub(r"\.\d+\.", ".*.", self.others[name]) for name in self.unplaced))

    @property
    def blocks(self) -> list[int]:
        """Sizes of blocks of rows or columns that share a scale. The last block of a weight may be smaller."""
        sizes = re.findall(
            r'"(?:weight_block_size|block_structure|group_size)": ([^"]*)',
            json.dumps(self.settings),
        )
        return sorted({int(number) for text in sizes for number in re.findall(r"\d+", text)})

    def smaller(
        self,
        model: PreTrainedModel,
        part_of: Callable[[str], Part | None],
        kept: Mapping[str, Sequence[int]],
        strict: bool,
    ) -> dict[str, StoredTensor]:
        """The tensors that are loaded, with the groups `kept` of each part; if `strict`, all or a ValueError."""
        found = dict[str, StoredTensor]()
        for name, place in self.places.items():
            tensor = self.stored[name]
            part = part_of(place)
            groups = () if part is None else kept[part.name]
            if part is None:
                found[name] = tensor
            elif part.is_mixture and (
                match := _EXPERT.fullmatch(name)
            ):  # every expert has tensors of its own
                if int(match[2]) in groups:
                    found[f"{match[1]}{groups.index(int(match[2]))}{match[3]}"] = tensor
            else:
                axis, repeats = part.tensors.get(
                    place, (0, 1)
                )  # scales of inputs of experts are no parameters
                whole = tensor.shape if part.is_mixture else model.get_parameter(place).shape
                size = tensor.shape[axis] if len(tensor.shape) == len(whole) else 0
                span = math.ceil(whole[axis] / size) if size else whole[axis]
                span = (
                    span
                    if span == 1
                    else min((block for block in self.blocks if block >= span), default=span)
                )
                if math.prod(tensor.shape) == 1 or size == 1:  # a scale of all groups
                    found[name] = tensor
                elif not (
                    size % (part.groups * repeats)
                    or span * size != whole[axis]
                    or name.endswith("_packed")
                ):
                    found[name] = tensor.selected(axis, part.entries(size, repeats, groups))
                elif strict:
                    gone = whole[axis] // (part.groups * repeats)
                    why = f"stores one value for {span} rows or columns of {place}, and groups of {gone} are removed"
                    why = (
                        "is of a packed weight, which can't be cut"
                        if re.search("_(packed|shape)$", name)
                        else why
                    )
                    raise ValueError(
                        f"{name} {why}: pass another pattern, or a dtype (--dtype), and it is written in that."
                    )
        return found

    def require_no_numbers(self) -> None:
        """Refuse patterns of quantized modules that name decoder layers by number: only plain names are renumbered."""
        plain, word = map(
            re.escape, (self.layers, self.layers.removesuffix(".").rpartition(".")[2])
        )
        known = [name for name in self.stored if not name.startswith(self.layers)]
        known += [self.places[name] for name in known if name in self.places]
        waiting: list[Any] = [
            value for value in self.settings.values() if isinstance(value, dict | list)
        ]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value
            elif any(
                name.startswith(f"{value}.") for name in known
            ):  # a module outside the decoder layers
                continue
            elif re.search(
                rf"^(?!{plain}).*\b{word}\\?\.[^.a-zA-Z]*\d", str(value).replace("[0-9]", "")
            ):
                raise ValueError(
                    f"quantization_config names decoder layers by number in {value!r}, and other layers get these "
                    "numbers: pass another pattern, or a dtype (--dtype), in which the result is then written."
                )

    def renamed(self, stay: Sequence[int], total: int) -> SourceTensors:
        """The tensors by their names in a model that keeps the decoder layers `stay` of `total`.

        Tensors of removed layers go. Layers that predict more tokens come after the last decoder layer, so they move.
        """
        numbers = {old: new for new, old in enumerate(stay)}

        def new_name(name: str) -> str | None:
            match = re.match(rf"({re.escape(self.layers)})(\d+)(\..*|)", name)
            if match is None or not self.layers:
                return name
            old = int(match[2])
            new = numbers.get(old) if old < total else old - total + len(stay)
            return None if new is None else f"{match[1]}{new}{match[3]}"

        def renamed(values: Mapping[str, T]) -> dict[str, T]:
            return {
                new: value for name, value in values.items() if (new := new_name(name)) is not None
            }

        def in_lists(value: Any) -> Any:  # such as the modules that are not quantized
            if isinstance(value, dict):
                return {key: in_lists(one) for key, one in value.items()}
            if not isinstance(value, list):
                return value
            names = (new_name(one) if isinstance(one, str) else in_lists(one) for one in value)
            return [name for name in names if name is not None]

        parts = renamed(self.stored), renamed(self.places), renamed(self.others)
        return SourceTensors(*parts, self.lost, self.layers, in_lists(self.settings))


def source_tensors(
    model: PreTrainedModel,
    source: Path,
    part_of: Callable[[str], Part | None] = lambda _: None,
    *,
    quantized: bool = True,
) -> SourceTensors:
    """Find the tensors in the files of a loaded model.

    A run that makes the tensors of parts smaller (`part_of`) does not copy other modules that have tensors of the same
    name and shape, because the configuration has one number of experts, for instance, for decoder layers and for layers
    that predict more tokens. If the result is not `quantized`, other modules are dequantized, or not copied. Two
    tensors with different values for one place are refused.
    """
    stored, state = read_stored(source), model.state_dict()
    config = read_json(source / CONFIG_FILE) if (source / CONFIG_FILE).exists() else {}
    sections = [
        config,
        *(value for value in config.values() if isinstance(value, dict)),
    ]  # the decoder's may have it
    settings: dict[str, Any] = next(
        (part[PACKED_KEY] for part in sections if PACKED_KEY in part), {}
    )
    dequantizer = (
        dequantizer_of(source) if settings else None
    )  # it reads the configuration by its class
    settings = settings if dequantizer else {}  # packed ones are not quantized
    transforms = get_model_conversion_mapping(model, hf_quantizer=dequantizer)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    layers, modules = f"{find_decoder_layers(model).name}.", dict(model.named_modules())
    packed = {f"{name}{suffix}" for name in packed_names(stored) for suffix in SUFFIXES}
    loaded_as, places, others, prefixes = (
        dict[str, str](),
        dict[str, str](),
        dict[str, str](),
        Counter[str](),
    )
    rename = partial(
        rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=state
    )
    for name in (name for name in stored if name not in packed):
        # as this version of Transformers names a stored tensor; several that it merges still have names of their own
        own, place = (rename(name, renamings, found)[0] for found in ([], converters))
        if place not in state:
            place = plain = rename(name, [], [])[0]
            own = plain if plain in state else own
        if place in state or (dequantizer is not None and _ACTIVATION_SCALES.search(name)):
            places[name] = place
            if (
                dequantizer is None
                and stored[name].dtype not in DENSE
                and state[place].is_floating_point()
            ):
                why = f"has dtype {stored[name].dtype}, and config.json has no quantization_config to read it by"
                raise ValueError(
                    f"{name} {why}: copy that of the quantized model into {str(source / CONFIG_FILE)!r}."
                )
            if (other := loaded_as.setdefault(own, name)) != name and not stored[name].equals(
                stored[other]
            ):
                why = f"are both {own} of {type(model).__name__}, with different values"
                raise ValueError(
                    f"{name} and {other} {why}: delete the wrong one from the files of the model."
                )
            if place.startswith(layers):
                prefix, number, _ = f".{name}".partition(
                    f".{place.removeprefix(layers).partition('.')[0]}."
                )
                prefixes[f"{prefix}."[1:]] += bool(number)
            continue
        if f"{model.base_model_prefix}.{own.partition('.')[0]}" in modules:
            own = f"{model.base_model_prefix}.{own}"  # stored without it
        words = own.split(".")
        above = (
            ".".join(words[:count]) for count in range(1, len(words))
        )  # from the outermost module inwards
        others[name] = next((module for module in above if module not in modules), own)
    prefix = max(prefixes, key=lambda prefix: prefixes[prefix], default="")
    smaller = [name for name, place in places.items() if part_of(place)]
    ends = {
        (re.sub(r"^.*?\.\d+\.", "", name), stored[name].shape) for name in smaller
    }  # inside a layer
    if dequantizer is not None and not quantized:
        stored, others = _dequantized(stored, others, dequantizer, model.dtype)
    counts, lost = Counter(others.values()), dict[str, str]()
    for name, module in others.items():
        if settings and not quantized and stored[name].dtype not in DENSE:
            lost[module] = f"{counts[module]} tensors: they are quantized, and the result is not"
        if any(name.endswith(f".{end}") and stored[name].shape == shape for end, shape in ends):
            lost[module] = f"{counts[module]} tensors: {_LOSES}"
    return SourceTensors(stored, places, others, lost, prefix, settings)


def _dequantized(
    stored: Mapping[str, StoredTensor],
    others: Mapping[str, str],
    dequantizer: Dequantizer,
    dtype: torch.dtype,
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Have tensors in FP8 that are not loaded dequantized when they are written. Other formats have other shapes."""
    stored, others, kinds = dict(stored), dict(others), dict[str, bool]()
    for name in [
        name for name in others if name.endswith(".weight") and stored[name].dtype.startswith("F8")
    ]:
        module, kind = name.removesuffix(".weight"), re.sub(r"\d+", "*", name)
        parts = {
            part: f"{module}.{part}" for part in ("weight", "weight_scale_inv", "weight_scale")
        }
        readers = {part: stored[key].tensor for part, key in parts.items() if key in others}
        read = partial(dequantizer.dense, module, readers, dtype)
        if kind not in kinds:  # one of each is tried, before the first decoder layer
            with suppress(Exception):  # of the format's operations
                kinds[kind] = len(readers) > 1 and read().shape == stored[name].shape
        if kinds.setdefault(kind, False):
            stored[name] = StoredTensor.of(
                torch.empty(stored[name].shape, dtype=dtype, device="meta"), read
            )
            others = {
                key: other
                for key, other in others.items()
                if key == name or key not in parts.values()
            }
    return stored, others


def in_dtypes_of(file: Path, known: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file again if tensors with `known` names have other dtypes there (`StoredTensor.holding`)."""
    saved = dict(_safetensors(file))
    both = {
        name: {known[name].dtype, tensor.dtype} for name, tensor in saved.items() if name in known
    }
    if differing := [name for name, dtypes in both.items() if len(dtypes) == 2 and dtypes <= DENSE]:
        write_file(
            file,
            _file_of(
                saved | {name: known[name].holding(saved[name].tensor()) for name in differing}
            ),
        )


def write_stored(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Write a safetensors file, with a piece of one tensor in memory at a time, and return its digest."""
    write_file(path, _file_of(tensors))
    return digest_of(path)


def _file_of(tensors: Mapping[str, StoredTensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors, those of the widest type first."""

    def order(name: str) -> tuple[int, str]:
        size = max(1, math.prod(tensors[name].shape))
        return -(tensors[name].num_bytes // size), name

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, names = 0, sorted(tensors, key=order)
    for name in names:
        start, end, tensor = end, end + tensors[name].num_bytes, tensors[name]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from tensors[name].pieces()


def _safetensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a safetensors file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(
                f"{str(file)!r} is damaged, or a pointer of Git LFS: download it again (git lfs pull)."
            )
        header = json.loads(opened.read(length))
    read = partial(_read, file, _state(file))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            yield (
                name,
                StoredTensor(
                    entry["dtype"], tuple(entry["shape"]), end - start, partial(read, start, end)
                ),
            )


def _state(file: Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


def _read(file: Path, state: tuple[int, int], start: int, end: int) -> Iterator[bytes]:
    if (
        not file.exists() or _state(file) != state
    ):  # a model in memory may be saved long after its files were read
        raise ValueError(
            f"{str(file)!r} changed or went during the run or after it: restore the old file and start again with it, "
            "or save the model without the tensors that its class does not load (model.save_pretrained)."
        )
    with file.open("rb") as opened:
        opened.seek(start)
        for place in range(start, end, _PIECE):
            yield opened.read(min(_PIECE, end - place))


def _binary(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a file of `torch.save`; files of PyTorch before 1.6 are no zip files, and can't be mapped."""
    read = partial(torch.load, file, weights_only=True, mmap=is_zipfile(file))
    for name, tensor in read(map_location="meta").items():
        if isinstance(tensor, Tensor):
            yield (
                name,
                StoredTensor.of(tensor, partial(lambda name: read(map_location="cpu")[name], name)),
            )
