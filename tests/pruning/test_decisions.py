import json
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgate as fg
from fastgate.digests import digest
from fastgate.pruning.costs import total_cost
from fastgate.pruning.decisions import GateDecision
from fastgate.pruning.targets import meet_target
from tests.helpers import assert_same_state, draw_masks, freeze_with, state_copy


class Signs(nn.Module):
    """Two gates whose decisions can be read off the images: open where a channel's mean is positive.

    `channels` has one gate per channel; `layer` looks at channel 0 alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.channels = fg.ChannelGate(3, depth=1)
        self.layer = fg.LayerGate(3, hidden_features=1)
        with torch.no_grad():
            self.channels.fc1.weight.copy_(torch.eye(3))
            self.channels.fc1.bias.zero_()
            self.layer.fc1.weight.copy_(torch.tensor([[1.0, 0, 0]]))
            self.layer.fc1.bias.zero_()
            # the head's ReLU keeps the positive part of channel 0; anything positive opens the gate
            self.layer.fc2.weight.fill_(1)
            self.layer.fc2.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channels(x) + self.layer(x)


def images(signs: list[tuple[int, int, int]]) -> Tensor:
    """One image per tuple of channel signs."""
    return torch.tensor(signs, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)


SIGNS = [
    (1, 1, -1),
    (1, -1, -1),
    (1, 1, -1),
    (1, -1, -1),
    (1, 1, -1),
    (-1, 1, -1),
    (1, -1, -1),
    (-1, 1, -1),
    (1, 1, -1),
]
# means over the nine samples: 7/9, 6/9, 0


@pytest.mark.parametrize("sizes", [(9,), (5, 3, 1), (1, 8), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("form", ["tensors", "tuples", "lists"])
def test_means_are_over_samples_whatever_the_batches(sizes: tuple[int, ...], form: str) -> None:
    batches = torch.split(images(SIGNS), sizes)
    wrap = {"tensors": lambda x: x, "tuples": lambda x: (x, torch.zeros(len(x))), "lists": lambda x: [x, 0]}[form]
    decisions = fg.decide(Signs(), [wrap(batch) for batch in batches])
    assert list(decisions) == ["channels", "layer"] and len(decisions) == 2
    assert (decisions.samples, decisions.threshold) == (9, 0.5)
    channels, layer = decisions["channels"], decisions["layer"]
    assert channels.mean.dtype == torch.float64 and channels.open.dtype == torch.bool
    assert channels.mean.tolist() == pytest.approx([7 / 9, 6 / 9, 0], rel=1e-15)
    assert channels.open.tolist() == [True, True, False]
    assert channels.unanimity.tolist() == pytest.approx([7 / 9, 6 / 9, 1], rel=1e-15)
    assert layer.mean.tolist() == pytest.approx([7 / 9]) and layer.open.tolist() == [True]
    # 3 of 4 gates; the mean over gates of the mean over channels of g (1 - g)
    assert decisions.open_ratio == 3 / 4
    assert decisions.polarization == pytest.approx(((14 / 81 + 18 / 81 + 0) / 3 + 14 / 81) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("threshold", "opened"),
    [(0.5, [True, True, False]), (0.7, [True, False, False]), (0.0, [True, True, False]), (1.0, [False, False, False])],
)
def test_a_gate_opens_where_its_mean_exceeds_the_threshold(threshold: float, opened: list[bool]) -> None:
    decisions = fg.decide(Signs(), [images(SIGNS)], threshold)
    assert decisions["channels"].open.tolist() == opened
    assert decisions.threshold == threshold


def test_a_mean_at_the_threshold_is_closed() -> None:
    decisions = fg.decide(Signs(), [images([(1, 1, 1), (-1, 1, 1)])], 0.5)
    assert decisions["channels"].mean.tolist() == [0.5, 1, 1]
    assert decisions["channels"].open.tolist() == [False, True, True]


def test_deciding_changes_nothing_in_the_model() -> None:
    model = fg.models.resnet(8, gating="channel")
    model.layer1.eval()  # a part that a user holds in eval mode stays there
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    state = state_copy(model)
    decisions = fg.decide(model, [torch.randn(4, 3, 8, 8), torch.randn(1, 3, 8, 8)])
    assert decisions.samples == 5
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert_same_state(model, state)
    assert not any(gate.frozen for _, gate in fg.named_gates(model))


def test_the_mode_is_restored_when_the_loader_fails() -> None:
    model = Signs().train()

    def loader() -> object:
        yield images(SIGNS)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        fg.decide(model, loader())
    assert all(module.training for module in model.modules())


def test_sampling_estimators_are_asked_without_noise() -> None:
    model = fg.models.resnet(8, gating="layer", estimator="bernoulli", init_logit=0.2)
    decisions = fg.decide(model, [torch.randn(16, 3, 8, 8)])
    assert [d.mean.item() for d in decisions.values()] == [1.0, 1.0, 1.0]


def test_frozen_gates_decide_as_they_are() -> None:
    model = fg.models.resnet(8, gating="channel")
    masks = draw_masks(model, "random")
    freeze_with(model, masks)
    decisions = fg.decide(model, [torch.randn(3, 3, 8, 8)])
    assert all(torch.equal(decisions[name].open, mask) for name, mask in masks.items())
    assert decisions.polarization == 0


def test_a_loader_of_torch_is_a_loader() -> None:
    dataset = torch.utils.data.TensorDataset(images(SIGNS), torch.zeros(9))
    decisions = fg.decide(Signs(), torch.utils.data.DataLoader(dataset, batch_size=4))
    assert decisions["channels"].mean.tolist() == pytest.approx([7 / 9, 6 / 9, 0])


class Keywords(Signs):
    """Takes its images by name, and labels, as networks of Hugging Face do."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": super().forward(pixel_values)}


class Images(Signs):
    """Takes a list of images `[C, H, W]`, as detection does."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"boxes": y} for y in super().forward(torch.stack(images))]


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Keywords(), {"pixel_values": images(SIGNS), "labels": torch.zeros(9)}),
        (Keywords(), ({"pixel_values": images(SIGNS)}, torch.zeros(9))),
        (Keywords(), ((images(SIGNS), torch.zeros(9)), torch.zeros(9))),
        (Images(), (list(images(SIGNS)), [{}] * 9)),
    ],
    ids=["keywords", "keywords-and-targets", "positional-and-targets", "list-of-images-and-targets"],
)
def test_batches_of_nested_values(model: nn.Module, batch: object) -> None:
    assert fg.decide(model, [batch])["channels"].mean.tolist() == pytest.approx([7 / 9, 6 / 9, 0])


def test_a_forward_function_gets_the_whole_batch() -> None:
    # as torchvision's detection references collate: tuples of images and of targets
    batch = (tuple(images(SIGNS)), ({},) * 9)
    decisions = fg.decide(Images(), [batch], forward=lambda model, batch: model(list(batch[0])))
    assert decisions["channels"].mean.tolist() == pytest.approx([7 / 9, 6 / 9, 0])


def test_decide_refuses_what_it_cannot_ask() -> None:
    with pytest.raises(ValueError, match=r"model: expected gates, got none; .*attach"):
        fg.decide(fg.models.resnet(8), [])
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        fg.decide(Signs(), [])
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="threshold: expected a number between 0 and 1, got"):
            fg.decide(Signs(), [images(SIGNS)], threshold)

    class Unused(Signs):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.channels(x)

    with pytest.raises(ValueError, match="gate 'layer' did not run in the model's forward"):
        fg.decide(Unused(), [images(SIGNS)])


def test_decisions_of_an_earlier_forward_do_not_count() -> None:
    class Skipping(Signs):
        whole = True

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.whole else x * self.channels(x)

    model = Skipping()
    model(images(SIGNS))
    assert model.layer.decisions is not None
    model.whole = False
    with pytest.raises(ValueError, match="gate 'layer' did not run in the model's forward"):
        fg.decide(model, [images(SIGNS)])


def random_network(gating: str) -> nn.Module:
    """A network whose gates are divided about random images."""
    model = fg.models.resnet(14, gating=gating, hidden_features=8)
    with torch.no_grad():
        for _, gate in fg.named_gates(model):
            for parameter in gate.parameters():
                parameter.normal_()
    return model


BATCHES = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_a_target_is_met_with_what_the_first_batch_costs(cost: str) -> None:
    model = random_network("channel")
    asked = fg.decide(model, BATCHES)
    met = fg.decide(model, BATCHES, target=0.6, cost=cost)
    assert met.samples == asked.samples == 18
    assert all(torch.equal(met[name].mean, gate.mean) for name, gate in asked.items())
    fg.freeze(model, met)
    small = fg.compact(model)
    assert total_cost(small, (3, 8, 8), cost) == pytest.approx(0.6 * total_cost(model, (3, 8, 8), cost), rel=0.005)


def test_a_target_with_known_costs_and_rounded_channels() -> None:
    model = random_network("channel")
    costs = fg.gate_costs(model, (3, 8, 8))
    met = fg.decide(model, (batch for batch in BATCHES), target=0.6, costs=costs, round_to=8)
    assert met == meet_target(fg.decide(model, BATCHES), costs, 0.6, costs.total, round_to=8)
    assert all(int(gate.open.sum()) % 8 == 0 for gate in met.values())
    assert met == fg.decide(model, BATCHES, target=0.6, costs=dict(costs), total=costs.total, round_to=8)


def test_a_target_for_networks_that_are_called_otherwise() -> None:
    model = random_network("layer")
    wanted = fg.decide(model, BATCHES, target=0.6)
    batches = [{"image": {"pixels": batch}} for batch in BATCHES]
    assert fg.decide(model, batches, target=0.6, forward=lambda net, batch: net(batch["image"]["pixels"])) == wanted


def test_frozen_gates_keep_their_decision_beside_a_target() -> None:
    model = random_network("layer")
    gates = dict(fg.named_gates(model))
    first, *_, last = gates
    gates[first].freeze(torch.tensor([False]))
    gates[last].freeze(torch.tensor([True]))
    for target in (0.3, 0.9):
        met = fg.decide(model, BATCHES, target=target)
        assert (met[first].open.item(), met[last].open.item()) == (False, True)


def test_a_target_out_of_reach_is_refused_before_any_gate_is_asked() -> None:
    def loader() -> Iterator[Tensor]:
        yield BATCHES[0]
        raise AssertionError("the second batch was asked for")

    with pytest.raises(ValueError, match=r"target: expected 0\.\d+ to 1 of the network's cost .*, got 0.01"):
        fg.decide(random_network("layer"), loader(), target=0.01)


def test_what_does_not_go_with_a_target_or_without() -> None:
    model = random_network("channel")
    costs = fg.gate_costs(model, (3, 8, 8))
    for name, value in {"costs": costs, "total": 1, "round_to": 8}.items():
        with pytest.raises(ValueError, match=f"{name}: expected it together with a target"):
            fg.decide(model, BATCHES, **{name: value})
    with pytest.raises(ValueError, match=r"threshold: expected none with a target.*, got 0.7"):
        fg.decide(model, BATCHES, 0.7, target=0.6)
    with pytest.raises(ValueError, match=r"total: expected the cost of the whole network.*fastgate\.gate_costs"):
        fg.decide(model, BATCHES, target=0.6, costs=dict(costs))
    with pytest.raises(ValueError, match="cost: expected one of macs, params, latency, got 'joules'"):
        fg.decide(model, BATCHES, target=0.6, cost="joules")
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        fg.decide(model, [], target=0.6)


def test_decisions_are_equal_where_their_tensors_are() -> None:
    first, same = (fg.decide(Signs(), [images(SIGNS)]) for _ in range(2))
    assert first == same
    others = [fg.decide(Signs(), [images(SIGNS[:5])]), fg.decide(Signs(), [images(SIGNS)], 0.7)]
    smaller = fg.Decisions({**first, "channels": GateDecision(torch.zeros(2).double(), torch.zeros(2).bool())})
    for other in (*others, smaller, fg.Decisions({"layer": first["layer"]})):
        assert first != other


# JSON


def assert_same(got: fg.Decisions, wanted: fg.Decisions) -> None:
    assert list(got) == list(wanted)
    assert (got.threshold, got.samples) == (wanted.threshold, wanted.samples)
    for name, decision in wanted.items():
        assert torch.equal(got[name].mean, decision.mean) and got[name].mean.dtype == torch.float64
        assert torch.equal(got[name].open, decision.open) and got[name].open.dtype == torch.bool


@given(st.dictionaries(st.text(min_size=1), st.lists(st.floats(0, 1), min_size=1, max_size=5), max_size=4))
def test_json_text_gives_back_every_bit(means: dict[str, list[float]]) -> None:
    gates = {}
    for name, values in means.items():
        mean = torch.tensor(values, dtype=torch.float64)
        gates[name] = GateDecision(mean, mean > 0.3)
    wanted = fg.Decisions(gates, 0.3, 17)
    assert_same(fg.Decisions.from_json(wanted.to_json()), wanted)


@pytest.mark.parametrize("as_text", [True, False], ids=["str", "Path"])
def test_json_file_gives_back_every_bit(tmp_path: Path, as_text: bool) -> None:
    wanted = fg.decide(Signs(), [images(SIGNS)])
    path = tmp_path / "decisions.json"
    text = wanted.to_json(str(path) if as_text else path)
    assert path.read_text() == text and json.loads(text)["gates"]["layer"]["open"] == [True]
    assert_same(fg.Decisions.from_json(str(path) if as_text else path), wanted)
    assert os.listdir(tmp_path) == ["decisions.json"]


def good() -> dict:
    return json.loads(fg.decide(Signs(), [images(SIGNS)]).to_json())


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"format": None},
        {"version": 3},
        {"threshold": 0.4},  # as it may be, but not as it was written
        {"gates": None},
        {"gates": {"layer": {"mean": [0.5]}}},
        {"gates": {"layer": {"mean": ["high"], "open": [True]}}},
        {"gates": {"layer": {"mean": [0.1, 0.2], "open": [True]}}},
        {"gates": {"layer": {"mean": 0.1, "open": True}}},
        {"threshold": "high"},
    ],
    ids=str,
)
def test_foreign_json_is_refused(change: dict, tmp_path: Path) -> None:
    text = json.dumps({**good(), **change})
    with pytest.raises(
        ValueError, match="decisions: expected JSON of format 'fastgate-decisions' version 2, got a text"
    ):
        fg.Decisions.from_json(text)
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"got .*foreign\.json with .*; write it with Decisions\.to_json"):
        fg.Decisions.from_json(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [7.0]}, "7.0 for the mean of 'layer', which is a number from 0 to 1"),
        ({"mean": [-1]}, "-1 for the mean of 'layer'"),
        ({"mean": [float("nan")]}, "nan for the mean of 'layer'"),
        ({"mean": [True]}, "True for the mean of 'layer'"),
        ({"mean": [10**400]}, "000 for the mean of 'layer'"),
        ({"mean": ["high"]}, "'high' for the mean of 'layer'"),
        ({"open": [0.3]}, "0.3 for a decision of 'layer', which is true or false"),
        ({"open": [1]}, "1 for a decision of 'layer'"),
        ({"rows": -1}, "-1 for the number of rows, which is 0 or more"),
        ({"rows": 2.5}, "2.5 for the number of rows"),
        ({"samples": -3}, "-3 for the number of samples"),
        ({"samples": True}, "True for the number of samples"),
        ({"threshold": 1.5}, "1.5 for threshold"),
        ({"threshold": float("nan")}, "nan for threshold"),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", [1, 2])
def test_values_out_of_range_are_refused(change: dict, message: str, version: int) -> None:
    data = {**good(), "version": version}
    for name, value in change.items():
        (data["gates"]["layer"] if name in data["gates"]["layer"] else data)[name] = value
    del data["sha256"]
    if version == 2:
        data["sha256"] = digest(data)  # whoever wrote it so
    with pytest.warns(UserWarning) if version == 1 else nullcontext(), pytest.raises(ValueError, match=message) as got:
        fg.Decisions.from_json(json.dumps(data))
    assert len(str(got.value).splitlines()) == 1


def test_decisions_of_an_earlier_version_are_read_with_a_note() -> None:
    wanted = fg.decide(Signs(), [images(SIGNS)])
    data = {**json.loads(wanted.to_json()), "version": 1}
    del data["sha256"]
    with pytest.warns(UserWarning, match="a text: decisions of an earlier version, which cannot be checked for damage"):
        assert_same(fg.Decisions.from_json(json.dumps(data)), wanted)


@pytest.mark.parametrize("content", [b"{", b'{"a": 1}', b"[]", b"", b"3", b"\xff\xfe\x00"])
def test_files_that_are_no_such_document_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"decisions: expected JSON of .*'fastgate-decisions' .*decisions\.json with"):
        fg.Decisions.from_json(path)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]", "", "\n "])
def test_texts_that_are_no_such_document_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="decisions: expected JSON of format 'fastgate-decisions' version 2, got a te"):
        fg.Decisions.from_json(text)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    # what does not begin like JSON is the name of a file
    for source in (tmp_path / "none.json", str(tmp_path / "none.json"), tmp_path, "hello"):
        with pytest.raises(FileNotFoundError, match=r"expected a file written by Decisions\.to_json, found none"):
            fg.Decisions.from_json(source)


# freeze


def test_freeze_stores_every_decision_in_place() -> None:
    model = fg.models.resnet(8, gating="channel")
    masks = draw_masks(model, "random")
    decisions = fg.Decisions({name: GateDecision(mask.double(), mask) for name, mask in masks.items()})
    # what comes from JSON freezes alike
    assert fg.freeze(model, fg.Decisions.from_json(decisions.to_json())) is model
    for name, gate in fg.named_gates(model):
        assert gate.frozen and torch.equal(gate.open, masks[name])


@pytest.mark.parametrize(
    ("gating", "other", "message"),
    [
        # a deeper network: more names; another gating: other sizes; another position: other sizes in some gates
        (
            (8, "layer", "middle"),
            (14, "layer", "middle"),
            r"expected the 3 gates of this model, got 6 .*layer1\.1\.gate",
        ),
        ((8, "layer", "middle"), (8, "channel", "middle"), r"gate 'layer1\.0\.gate' expects 1 entries, got 16"),
        ((8, "channel", "middle"), (8, "channel", "before"), r"gate 'layer2\.0\.gate' expects 32 entries, got 16"),
    ],
)
def test_decisions_of_another_network_change_nothing(gating: tuple, other: tuple, message: str) -> None:
    model = fg.models.resnet(gating[0], gating=gating[1], position=gating[2])
    foreign = fg.models.resnet(other[0], gating=other[1], position=other[2])
    decisions = fg.decide(foreign, [torch.randn(2, 3, 8, 8)])
    state = state_copy(model)
    with pytest.raises(ValueError, match=rf"decisions: .*{message}.*decisions of another network"):
        fg.freeze(model, decisions)
    assert_same_state(model, state)
    assert not any(gate.frozen for _, gate in fg.named_gates(model))


def test_repr_says_the_numbers() -> None:
    text = repr(fg.decide(Signs(), [images(SIGNS)]))
    assert text == "Decisions(2 gates, open ratio 0.7500, polarization 0.1523, 9 samples)"


@pytest.mark.gpu
def test_batches_are_moved_to_the_models_device() -> None:
    decisions = fg.decide(Signs().cuda(), [images(SIGNS)])
    assert decisions["channels"].mean.device.type == "cpu"
    assert decisions["channels"].open.tolist() == [True, True, False]


def test_calls_of_another_thread_do_not_count() -> None:
    model = Signs()
    wanted = fg.decide(model, [images(SIGNS)])
    opposite, other_ran, ended = (
        images([tuple(-sign for sign in signs) for signs in SIGNS]),
        threading.Event(),
        threading.Event(),
    )

    def use() -> None:
        while not ended.is_set():
            model(opposite)
            other_ran.set()

    def batches() -> Iterator[Tensor]:
        yield images(SIGNS)
        other_ran.clear()
        assert other_ran.wait(60)  # between the forward and the next one the other has called it

    other = threading.Thread(target=use)
    other.start()
    try:
        assert_same(fg.decide(model, batches()), wanted)
    finally:
        ended.set()
        other.join()


def test_training_mode_from_elsewhere_is_noticed() -> None:
    model = Signs()
    model.register_forward_hook(lambda *_: model.train() and None)
    with pytest.raises(
        RuntimeError, match="model: expected eval mode while its gates are evaluated, got training mode"
    ):
        fg.decide(model, [images(SIGNS)])
