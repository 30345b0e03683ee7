"""Damaged files, failing writes and malicious files: nothing is lost, nothing silently wrong, no code is run."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import damage
import malice
import pytest
import torch
import writing
from conftest import final_weights, numbers, power_cut, same_bits
from kill import differences
from trials import Tally

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError, ClientFailure, WeightsError
from fl_taskarith.figures.run_groups import find_runs, members, read_run
from fl_taskarith.masking.mask import Mask, load_mask, save_mask
from fl_taskarith.models.weights import read_tensors
from fl_taskarith.storage.run_folder import Logbook, read_rounds
from fl_taskarith.storage.tensor_file import check_seal, sealed
from fl_taskarith.storage.verified_files import CHECKSUMS


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    return dataclasses.replace(damage.TINY, results_dir=str(tmp_path / "results"))


def none_lost(*tallies: Tally) -> None:
    for tally in tallies:
        assert tally.lost == [], tally.fault
        assert tally.trials > 0 or "tmpfs" in tally.fault or "read-only" in tally.fault, tally.fault


@pytest.mark.parametrize(
    "kind",
    [damage.checkpoints, damage.client_files, damage.prefix_caches, damage.starts, damage.unfinished_run,
     damage.finished_run],
)  # fmt: skip
def test_damage_is_told_or_mended(kind: Callable[..., Tally | list[Tally]], tmp_path: Path) -> None:
    found = kind(tmp_path, 48, seed=1)
    none_lost(*(found if isinstance(found, list) else [found]))


@pytest.mark.slow
def test_damage_at_many_positions_is_told_or_mended(tmp_path: Path) -> None:
    none_lost(*damage.all_kinds(tmp_path, 400, seed=2))


def test_a_trial_that_accepts_other_content_counts_as_lost(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_bytes(b"0123456789" * 20)
    tally = Tally("a file without a checksum")
    damage.try_damage(tally, path, 16, 0, lambda: path.read_bytes() == b"0123456789" * 20)
    assert len(tally.lost) == tally.trials == 16
    damage.try_damage(tally, path, 4, 0, lambda: 1 / 0)
    assert len(tally.lost) == 20


@pytest.mark.parametrize("file", ["checkpoint", "frozen"])
def test_a_cut_run_whose_file_is_damaged_ends_the_same(tiny: Config, file: str) -> None:
    whole = simulate(tiny, run_name="whole").folder
    with power_cut(1):
        simulate(tiny, run_name="cut")
    cut = whole.parent / "cut"
    found = max((cut / "checkpoints").iterdir()) if file == "checkpoint" else next(cut.glob("client-states/frozen-*"))
    content = bytearray(found.read_bytes())
    content[len(content) // 2] ^= 4
    found.write_bytes(content)
    mask = cut / "mask.safetensors"  # which round 0 wrote, is not there or another one
    if file == "checkpoint":
        mask.unlink()
    else:
        save_mask(mask, Mask({name: ~bits for name, bits in load_mask(mask)[0].tensors.items()}), {"model": "other"})
    assert differences(whole, simulate(tiny, run_name="cut").folder) == []


@pytest.mark.slow
def test_a_damaged_state_of_a_client_stops_the_run_and_the_checkpoint_before_continues_it(tiny: Config) -> None:
    config = dataclasses.replace(tiny, strategy="scaffold", participation=1.0, num_rounds=3)
    whole = simulate(config, run_name="whole").folder
    with power_cut(2):
        simulate(config, run_name="cut")
    cut = whole.parent / "cut"
    state = next(path for path in (cut / "client-states" / "000004").iterdir() if path.name.startswith("round-000002"))
    state.write_bytes(state.read_bytes()[:-3])
    with pytest.raises(ClientFailure, match=f"Client 4 .*{state.name}.*delete the newest checkpoint"):
        simulate(config, run_name="cut")
    max((cut / "checkpoints").iterdir()).unlink()
    assert differences(whole, simulate(config, run_name="cut").folder) == []


def test_a_run_does_not_go_on_from_other_pretrained_weights(tiny: Config, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    model = simulate(tiny, run_name="model").folder / "model.safetensors"
    weights.write_bytes(model.read_bytes())
    config = dataclasses.replace(tiny, weights=str(weights), run_name="cut")
    with power_cut(1):
        simulate(config)
    tensors = final_weights(model.parent)
    tensors["norm.weight"][0] += 1e-3
    weights.write_bytes(sealed(tensors, {}))
    from fl_taskarith.workspace.workspace import _workspace

    _workspace.cache_clear()  # as in a process of its own
    with pytest.raises(CheckpointError, match="pretrained weights are not those"):
        simulate(config)
    weights.write_bytes(model.read_bytes())
    _workspace.cache_clear()
    assert len(simulate(config).rows) == 3


def test_a_changed_digit_of_a_finished_run_is_told_wherever_it_is_read(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = simulate(tiny, run_name="run").folder
    names = [line.split()[1] for line in (run / CHECKSUMS).read_text().splitlines()]
    assert names == ["mask.safetensors", "model-best.safetensors", "model.safetensors", "rounds.csv", "run.json"]
    table, record = (run / "rounds.csv").read_text(), (run / "run.json").read_text()
    last = table.splitlines()[-1]
    changed = last.replace(last.split(",")[6], f"{read_rounds(run)[-1]['test_accuracy'] + 0.01!r}")
    (run / "rounds.csv").write_text(table.replace(last, changed))
    assert main(["plot", str(run)]) == 1
    assert "rounds.csv has changed since its run ended" in capsys.readouterr().err
    (run / "rounds.csv").write_text(table)
    (run / "run.json").write_text(record.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CheckpointError, match=r"run\.json has changed"):
        members([read_run(run)])
    (run / "run.json").write_text(record.replace('"finished"', '"finishes"', 1))
    with pytest.raises(CheckpointError, match=r"run\.json has changed"):
        members(find_runs([run.parent]))
    (run / CHECKSUMS).unlink()  # the change was meant
    assert read_rounds(run)[-1]["round"] == 2


def test_a_run_that_goes_on_is_checked_anew(tiny: Config) -> None:
    with power_cut(1):
        simulate(tiny, run_name="cut")
    cut = Path(tiny.results_dir) / "cut"
    (cut / CHECKSUMS).write_text("0" * 64 + "  rounds.csv\n")
    rows = numbers(simulate(tiny, run_name="cut").folder)
    assert [row["round"] for row in rows] == [0, 1, 2]


def test_a_folder_is_free_again_after_a_failure_to_begin(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock goes although the error's traceback still holds the logbook."""
    with power_cut(1):
        simulate(tiny, run_name="cut")
    kept = {}
    for path in (Path(tiny.results_dir) / "cut" / "checkpoints").iterdir():
        kept[path] = path.read_bytes()
        path.write_bytes(b"damaged")
    config = dataclasses.replace(tiny, run_name="cut")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        Logbook(config)
    for path, content in kept.items():
        path.write_bytes(content)
    with Logbook(config) as logbook:
        assert logbook.restored is not None
    assert caught.value is not None


# writes


def test_a_disk_that_fills_up_at_any_write_costs_nothing(tiny: Config) -> None:
    none_lost(writing.fault_at_every_write(dataclasses.replace(tiny, num_rounds=1), 4))


@pytest.mark.slow
def test_a_disk_that_fills_up_at_every_write_costs_nothing(tiny: Config) -> None:
    none_lost(writing.fault_at_every_write(tiny, None), writing.limited_files(tiny, 4))


@pytest.mark.slow
def test_a_small_disk_and_a_read_only_folder_cost_nothing(tiny: Config) -> None:
    short = dataclasses.replace(tiny, num_rounds=1)
    none_lost(writing.small_disks(dataclasses.replace(short, results_dir=tiny.results_dir), 2))
    none_lost(writing.read_only_folders(short))


# seals


def test_a_seal_covers_tensors_and_metadata_and_not_their_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.zeros(2, 3, dtype=torch.bfloat16), "empty": torch.zeros(0)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(sealed(tensors, {"facts": json.dumps({"ä": 1})}))
    assert check_seal(path)
    assert same_bits(read_tensors(path), tensors)
    path.write_bytes(sealed(tensors, {}))
    assert check_seal(path)


def test_a_file_from_elsewhere_has_no_seal_and_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
        assert not check_seal(tmp_path / "x.safetensors")
        assert torch.equal(read_tensors(tmp_path / "x.safetensors")["a"], torch.ones(2))


def test_a_mask_without_a_seal_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import save

    mask = Mask({"w": torch.tensor([True, False, True])})
    save_mask(tmp_path / "sealed.safetensors", mask, {"model": "m"})
    assert load_mask(tmp_path / "sealed.safetensors")[1] == {"model": "m"}
    assert "no checksum" not in caplog.text
    (tmp_path / "old.safetensors").write_bytes(save(mask.packed(), {"model": "m", "shapes": '{"w": [3]}'}))
    assert load_mask(tmp_path / "old.safetensors")[0].jaccard(mask) == 1.0
    assert "old.safetensors has no checksum" in caplog.text


def test_weights_that_are_not_finite_are_refused(tiny: Config, tmp_path: Path) -> None:
    tensors = final_weights(simulate(tiny, run_name="run").folder)
    tensors["norm.weight"][3] = torch.inf
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"NaN or infinite values in norm\.weight"):
        simulate(tiny, weights=str(tmp_path / "weights.pth"), run_name="other")


# code and paths


def test_no_file_runs_code(tmp_path: Path) -> None:
    none_lost(malice.malicious_files(tmp_path))


def test_no_run_name_leads_out_of_the_results(tmp_path: Path) -> None:
    none_lost(malice.run_names(tmp_path))
