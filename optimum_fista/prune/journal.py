"""The journal on disk by which a run from files to files resumes: what it has finished.

`identity.join_run` has compared the run with what lies in the unfinished folder, so a `Journal` reads and writes there
without looking at other runs. A run that is stopped and started again, however often, has the same result bit for bit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from optimum_fista.atomic import (
    digest_of,
    is_whole,
    read_record,
    write_record,
    write_tensors,
)
from optimum_fista.bars import tqdm
from optimum_fista.folder.output import JOURNAL, MODEL, RUN_FILE
from optimum_fista.model.activations import Storage
from optimum_fista.options import as_record
from optimum_fista.prune.plan import Budgets
from optimum_fista.prune.source_files import WEIGHTS_FILE
from optimum_fista.records import LayerRecord


@dataclass(frozen=True)
class KeptLayer:
    """A decoder layer whose final shard is on disk.

    Attributes:
        record: What its report says.
        shard: The name of its shard; empty if the layer is removed.
        sha256: Digests of the "shard", of the hidden states "before" the layer and "after" it, and of the "budgets"
            used to prune it; `None` if a file does not exist.
    """

    record: LayerRecord
    shard: str
    sha256: dict[str, str | None]


class Journal:
    """Finished decoder layers, hidden states and budgets of a run, in an unfinished folder.

    A decoder layer is finished when its record is there and its shard is whole. The record is written last, after the
    shard, the masks, and the hidden states that the next layer needs. No file is changed in place, and every layer has
    its own files, so that several processes can write layers at the same time. A record has the digests of its files
    and of itself: damaged files are not used.

    Args:
        folder: The unfinished folder; it holds the files of the journal, and the model.
        fingerprint: What identifies the run.

    Attributes:
        folder: As passed.
        model: The folder in it that becomes the output, with the final shards; it is made if it is missing.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open the journal in an unfinished folder; makes the folder of the model in it if that is missing.

        `folder` is beside the output, and locked by this run; it has a folder `journal` since it was locked.
        `fingerprint` is all that the result of the run depends on (`identity.run_fingerprint`). Nothing is read yet.
        """
        self.folder = folder
        self.model = folder / MODEL
        self._fingerprint = fingerprint
        self._budgets = folder / JOURNAL / "budgets.json"
        # Digest of the file of budgets; None until `budgets` has read it.
        self._budgets_sha256: str | None = None
        # Digests of files of hidden states, by the number of the layer that these enter.
        self._states_sha256: dict[int, str] = {}
        self.model.mkdir(exist_ok=True)

    def finished(
        self, *, check_shards: bool = True, progress: bool = False
    ) -> dict[int, KeptLayer]:
        """Read the records of the finished decoder layers, by index, without those whose shard is damaged or missing.

        `check_shards=False` trusts shards that exist; otherwise they are read and compared with their digests. Layers
        that were pruned with other budgets do not count, once `budgets` has read those of the run and noted their
        digest (`self._budgets_sha256`). `progress` shows a bar. Changes nothing. The records are files beside that of
        the budgets (`self._budgets`), and the shards are in the folder `self.model`.
        """
        layers: dict[int, KeptLayer] = {}
        files = sorted(self._budgets.parent.glob("layer-*.json"))
        bar = tqdm(
            files,
            desc="Reading finished layers",
            unit="layer",
            leave=False,
            disable=not (progress and files),
        )
        for file in bar:
            values = read_record(file)
            if values is None:  # the record is damaged
                continue
            kept = as_record(KeptLayer, values)
            shard = self.model / kept.shard
            is_there = shard.exists()  # for a removed layer, this is the folder
            if check_shards and kept.shard:
                is_there = is_whole(shard, kept.sha256["shard"])
            # The digest of the budgets is `None` until they are read.
            has_budgets = self._budgets_sha256 in (None, kept.sha256["budgets"])
            if is_there and has_budgets:
                index = int(file.stem.removeprefix("layer-"))
                layers[index] = kept
        return layers

    def keep_layer(
        self,
        index: int,
        shard: tuple[str, str] | None,
        masks: dict[str, Tensor],
        record: LayerRecord,
        streams: Mapping[str, Sequence[Tensor]],
    ) -> None:
        """Finish a decoder layer whose shard is on disk, and delete the hidden states that enter it.

        Writes files of hidden states, masks and the record of the layer, and notes the digest of the hidden states in
        `self._states_sha256`: the record of the next layer will have it, too. `self._budgets_sha256` is the digest of
        the budgets that the layer was pruned with.

        Args:
            index: The number of the layer.
            shard: Name and digest of the shard; `None` for a removed layer.
            masks: Packed masks of its operators.
            record: What its report says.
            streams: Hidden states that the next layer needs, by name, a batch each; empty if it needs none.
        """
        # The file of the masks; that of the record has the same name, with the ending .json.
        layer = self._file("layer", index)
        if streams:
            # By stream and batch, such as "pruned.12".
            hidden_states = {
                f"{name}.{number}": hidden.contiguous()
                for name, stream in streams.items()
                for number, hidden in enumerate(stream)
            }
            next_states = self._file("states", index + 1)
            self._states_sha256[index + 1] = write_tensors(next_states, hidden_states)
        shard_name = ""
        shard_sha256 = None
        if shard is not None:
            shard_name, shard_sha256 = shard
        # `None` if there is no such file.
        sha256 = {
            "shard": shard_sha256,
            "before": self._states_sha256.get(index),
            "after": self._states_sha256.get(index + 1),
            "budgets": self._budgets_sha256,
        }
        kept = KeptLayer(record, shard_name, sha256)
        write_record(layer.with_suffix(".json"), dataclasses.asdict(kept), masks)
        # Only now: they are needed until the record is written.
        self._file("states", index).unlink(missing_ok=True)

    def masks(self, index: int) -> dict[str, Tensor]:
        """Read the packed masks of a finished decoder layer."""
        return load_file(self._file("layer", index))

    def resume(
        self, finished: Mapping[int, KeptLayer], storage: Storage
    ) -> tuple[int, dict[str, list[Tensor]] | None]:
        """Count the first decoder layers that are finished, each on the hidden states of the layer before.

        Returns also the hidden states after them, by name ("dense", "pruned", and those of held-out text), a batch
        each; `None` if their file is missing or damaged. They are put on the device `storage`, or on the CPU if it is a
        folder. `finished` are layers by index, as the method `finished` returns them. Notes the digest of the file in
        `self._states_sha256`, and changes nothing else.
        """
        num_first = 0
        # Digest of the file of hidden states that the last of these layers left; `None` before the first layer.
        states_sha256 = None
        while num_first in finished and finished[num_first].sha256["before"] == states_sha256:
            states_sha256 = finished[num_first].sha256["after"]
            num_first += 1
        file = self._file("states", num_first)
        if states_sha256 is None or not is_whole(file, states_sha256):
            return num_first, None

        # `keep_layer` writes it into the record of the next layer.
        self._states_sha256[num_first] = states_sha256
        tensors = load_file(file)  # not on the device: safetensors can't load to every device
        device = torch.device("cpu") if isinstance(storage, Path) else storage
        streams: dict[str, list[Tensor]] = {}
        for key in sorted(tensors, key=_number_of_batch):
            name = key.partition(".")[0]
            # Popped, so that no tensor is in memory twice. The batches of a stream are in their order.
            streams.setdefault(name, []).append(tensors.pop(key).to(device))
        return num_first, streams

    def keep_budgets(self, budgets: Budgets, weights: Mapping[str, Any]) -> None:
        """Begin the run: write the hashes of the source's files, the run's fingerprint and its budgets to disk.

        `weights` are these hashes, by file name (`SourceFiles.hashes`). `self._fingerprint` identifies the run. The
        files are in the unfinished folder, `self.folder`; `self._budgets` is that of the budgets. Once the fingerprint
        is written, the folder is kept until the run ends. The budgets have the digest of the fingerprint, and layers
        that of the budgets, so that they belong to this run only.
        """
        run_file = self.folder / RUN_FILE
        write_record(self.folder / WEIGHTS_FILE, weights)
        write_record(run_file, self._fingerprint)
        # All fields but the tensors, which have a file of their own beside the record.
        values = {name: value for name, value in vars(budgets).items() if name != "output_weights"}
        values["run"] = digest_of(run_file)
        tensors = {
            name: weight.cpu().contiguous() for name, weight in budgets.output_weights.items()
        }
        write_record(self._budgets, values, tensors)

    def budgets(self) -> Budgets | None:
        """Read the budgets from disk; `None` if they are not written yet, damaged, or those of another run.

        This start of the run has written them by `keep_budgets` (in the first process), or an earlier one. Their file
        is `self._budgets`, and that of the run's fingerprint is in `self.folder`. Notes the digest of the budgets in
        `self._budgets_sha256`: from then on, `finished` leaves out layers that were pruned with other budgets.
        """
        values = read_record(self._budgets)
        if values is None or values["run"] != digest_of(self.folder / RUN_FILE):
            return None
        self._budgets_sha256 = digest_of(self._budgets)
        return Budgets(
            sparsities=values["sparsities"],
            output_weights=load_file(self._budgets.with_suffix(".safetensors")),
            without_gradient=values["without_gradient"],
            # JSON has lists in place of tuples.
            removed_layers=[(index, loss) for index, loss in values["removed_layers"]],
            # Logits that did not fit the estimate of memory. Runs that began before this was kept have no such entry.
            num_bytes_not_estimated=values.get("num_bytes_not_estimated", 0),
        )

    def _file(self, kind: str, index: int) -> Path:
        """Return the path of the tensors of a decoder layer: its masks ("layer") or what enters it ("states")."""
        return self._budgets.with_name(f"{kind}-{index:05}.safetensors")


def _number_of_batch(key: str) -> int:
    """Return the number in the name of a kept hidden state, such as "pruned.12"."""
    return int(key.partition(".")[2])
