import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from optimum_fista import FistaPruner, FistaPruningConfig
from optimum_fista.model.operator import is_linear
from optimum_fista.run.html_report.page import read_contents
from optimum_fista.run.html_report.row_sparsity import RowSparsities, read_sparsities
from optimum_fista.run.packed_folders.packed_folder import pack_folder
from optimum_fista.run.reports.operator_grid import layer_and_kind


def rows_of(model) -> dict[str, np.ndarray]:
    """Fraction of zeros by row of every linear operator of the decoder layers, from the weights."""
    found = {}
    for name, module in model.named_modules():
        if (is_linear(module) and ".layers." in f".{name}") or (".h." in name and is_linear(module)):
            weight = module.weight if type(module).__name__ == "Linear" else module.weight.T
            found[f"{name}.weight"] = (weight == 0).double().mean(1).numpy()
    return found


@pytest.mark.parametrize("which", ["saved", "saved_by_rows", "saved_gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_masks_say_what_the_weights_do(which, packed, request, tmp_path):
    saved = request.getfixturevalue(which)
    folder = saved.folder
    if packed:
        pack_folder(folder, folder := tmp_path / "packed")
    read = []
    found = read_sparsities(folder, saved.report, read.append)
    assert read == list(found.operators) == [o.name for o in saved.report.operators]
    assert found.operators == pytest.approx({o.name: o.sparsity for o in saved.report.operators})
    expected = rows_of(saved.model)
    for kind, rows in found.rows.items():
        of_kind = np.concatenate([expected[name] for name in found.operators if layer_and_kind(name)[1] == kind])
        assert rows.counts.sum() == len(of_kind)
        assert (rows.low, rows.high) == (pytest.approx(of_kind.min()), pytest.approx(of_kind.max()))
        assert rows.median == pytest.approx(np.quantile(of_kind, 0.5, method="inverted_cdf"), abs=1.1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_experts_of_a_mixture_are_one_kind(tokens, tmp_path, packed):
    model = tiny_model("gpt_oss")
    pruner = FistaPruner(FistaPruningConfig(method="magnitude"), progress=False)
    report = pruner.prune(model, tokens.split(4))
    pruner.save_pretrained(model, tmp_path / "dense")
    folder = tmp_path / "dense"
    if packed:
        pack_folder(folder, folder := tmp_path / "packed")
    found = read_contents(folder).sparsities
    assert len(found.operators) == len(report.operators)
    experts = [o for o in report.operators if o.name.endswith("down_proj.weight")]
    (kind,) = [kind for kind in found.rows if "down_proj" in kind]
    assert found.rows[kind].counts.sum() == sum(o.shape[0] for o in experts)
    assert sum(found.operators.values()) == pytest.approx(sum(o.sparsity for o in report.operators))


def test_a_missing_mask_is_named(saved, tmp_path):
    (tmp_path / "fista").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no fista/masks\.safetensors: pass a folder saved by"):
        read_sparsities(tmp_path, saved.report)
    masks = load_file(saved.folder / "fista" / "masks.safetensors")
    gone = next(iter(masks))
    del masks[gone]
    save_file(masks, tmp_path / "fista" / "masks.safetensors")
    with pytest.raises(ValueError, match=f"{gone} is in the report and has no mask"):
        read_sparsities(tmp_path, saved.report)


def test_bars_have_every_row_at_its_sparsity():
    rows = RowSparsities()
    rows.add(np.array([0.0, 0.019, 0.5, 0.5, 0.5, 1.0]))
    assert {index: count for index, count in enumerate(rows.bars) if count} == {0: 2, 25: 3, 49: 1}
    assert len(rows.bars) == 50
    assert (rows.low, rows.high, rows.median) == (0.0, 1.0, pytest.approx(0.5, abs=1e-3))
    even = RowSparsities()
    even.add(np.full(7, 0.3))
    assert even.low == even.high == even.median == 0.3
