"""The report of real short runs: what it says is what the run folders hold, and a browser shows it without a fault."""

import html
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

import fastgate as fg
from fastgate.reports.html import write_report
from fastgate.reports.loading import explain_loading
from fastgate.reports.runs import RunRecord
from fastgate.training.data import load_data, load_dataset
from fastgate.training.networks import build_network
from fastgate.training.pipeline import Run, describe_data, train
from fastgate.training.recipe import change
from tests.reports.browser import CHROMIUM, inspect_page
from tests.training.data.pictures import draw
from tests.training.runs import TINY

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "layer"
    train(Run(change(TINY, control="unpruned"), folder, command="fastgate train --output 'a <b> & c'"))
    return folder


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "channel"
    train(Run(change(TINY, gating="channel", seed=2), folder))
    return folder


class Tables(HTMLParser):
    """The texts of every table's cells, row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag == "small" and self.inside:
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data


def read_tables(page: Path) -> list[list[list[str]]]:
    return Tables(page.read_text()).tables


def copy_run(folder: Path, to: Path, edit: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A copy of a run without its control; `edit` changes every line of its metrics."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("control-*", "report.html"))
    if edit is not None:
        lines = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            edit(line)
        (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return to


def test_the_summary_is_that_of_the_run_folder(layer: Path) -> None:
    page = write_report([layer])
    assert page == layer / "report.html"
    rows = json.loads((layer / "summary.json").read_text())["rows"]
    header, *cells = read_tables(page)[0]
    assert [row[0] for row in cells] == list(rows)
    for row in cells:
        shown, true = dict(zip(header, row, strict=True)), rows[row[0]]
        assert shown["top-1"] == f"{true['accuracy']:.2%}"
        assert shown["open gates"] == f"{true['open_ratio']:.1%}"
        assert float(shown["MACs"].split()[0]) == pytest.approx(true["macs"] / 1e3, rel=5e-3)
        assert shown["latency"].startswith(f"{true['latency_ms']:.2f} ms")
        low, high = true["latency_ms_quartiles"]
        assert low <= true["latency_ms"] <= high
        assert shown["latency"].endswith(f" {low:.2f}\N{EN DASH}{high:.2f} ms")
        assert shown["images/s"].startswith(f"{true['images_per_second']:,.0f}")
    compact = dict(zip(header, next(row for row in cells if row[0] == "compact"), strict=True))
    assert compact["MACs"].endswith(f" {rows['compact']['macs'] / rows['unpruned']['macs']:.0%}")
    reached = f"{rows['compact']['macs'] / rows['unpruned']['macs']:.1%}"
    assert f"Asked for 50% of the MACs. The compact network has {reached} of the unpruned" in page.read_text()


def test_unknown_joules_have_a_reason_and_are_never_0(layer: Path) -> None:
    page = write_report([layer])
    header, *rows = read_tables(page)[0]
    last = json.loads((layer / "metrics.jsonl").read_text().splitlines()[-1])
    if last["joules"]["train"] is not None:
        pytest.skip("energy is metered on this machine")
    assert {row[header.index("energy/image")] for row in rows} == {"not metered"}
    assert {row[header.index("training energy")] for row in rows} == {"not metered"}
    assert page.read_text().count(last["energy"]["warnings"][0]) == 2  # below the table, and in place of the curve
    assert not re.search(r"\b0 J", page.read_text())


def test_metered_joules_and_the_macs_of_training_are_shown(layer: Path, tmp_path: Path) -> None:
    def meter(line: dict[str, Any]) -> None:
        line["joules"] = {"train": 21.5, "eval": 1.0, "total": 22.5 * line["epoch"]}
        line["energy"] = {"source": "nvml-counter", "warnings": ["the board was shared"]}
        line["macs_training"] = {"per_image": 1000 - line["epoch"], "total": 123_000 * line["epoch"]}

    run = copy_run(layer, tmp_path / "metered", meter)
    (run / "summary.json").unlink()  # the last epoch stands in for it
    page = write_report([run])
    header, _, row = read_tables(page)[0]
    assert row[header.index("training energy")] == "86 J"
    assert row[header.index("training MACs")] == "492 k"
    text = page.read_text()
    assert "joules from nvml-counter; the board was shared" in text
    assert 'data-said="epoch 1: 21.5 J;epoch 2: 21.5 J;epoch 3: 21.5 J;epoch 4: 21.5 J"' in text
    assert 'data-said="epoch 1: 999;epoch 2: 998;epoch 3: 997;epoch 4: 996"' in text


def test_curves_of_the_run_and_its_control(layer: Path) -> None:
    text = write_report([layer]).read_text()
    history = [json.loads(line) for line in (layer / "metrics.jsonl").read_text().splitlines()]
    said = ";".join(f"epoch {line['epoch']}: {line['eval']['accuracy'] * 100:.4g}%" for line in history)
    assert f'data-said="{said}"' in text
    # both in seven charts, the gates' losses of the run alone
    assert (text.count('<polyline class="curve c0"'), text.count('<polyline class="curve c1 dashed"')) == (10, 7)
    assert "layer, unpruned control" in text


def charts(text: str) -> dict[str, str]:
    """Title -> SVG of every chart of the page."""
    found = re.findall(r"<figcaption>([^<]*)<output></output></figcaption>(<svg.*?</svg></figure>|<svg.*)", text)
    return dict(found)


def test_curves_mark_the_phases_and_losses_stand_beside_them(layer: Path, channel: Path) -> None:
    text = write_report([layer]).read_text()
    assert "(open 1, search 2\N{EN DASH}3, settled 4)" in text
    drawn = charts(text)
    assert list(drawn) == [
        *("Accuracy", "Open gates", "MACs per image, closed gates left out", "MACs computed per training image"),
        *("Training seconds per epoch", "Task loss in training", "Loss in evaluation"),
        *(f"{name} loss, without its weight" for name in ("Polarization", "Budget", "Capacity")),
    ]
    for svg in drawn.values():
        assert re.findall(r"<title>([^<]*)</title>", svg) == [
            *("open: epoch 1", "search: epoch 2 to 3", "settled: epoch 4")
        ]
    history = [json.loads(line) for line in (layer / "metrics.jsonl").read_text().splitlines()]
    task = ";".join(f"epoch {line['epoch']}: {line['train']['task']:.3g}" for line in history)
    assert f'data-said="{task}"' in drawn["Task loss in training"]
    budget = ";".join(f"epoch {line['epoch']}: {line['train']['budget']:.3g}" for line in history[1:3])
    assert re.findall('data-said="([^"]*)"', drawn["Budget loss, without its weight"]) == [budget]
    # two runs of the same course share a strip, grey
    assert write_report([layer, channel]).read_text().count('class="phase shared"') == 3 * len(drawn)


def test_lines_that_name_their_phase_are_believed(layer: Path, tmp_path: Path) -> None:
    def name(line: dict[str, Any]) -> None:
        line["phase"] = "search" if line["epoch"] < 4 else "settled"

    text = write_report([copy_run(layer, tmp_path / "named", name)]).read_text()
    assert "(search 1\N{EN DASH}3, settled 4)" in text


def test_the_end_of_the_accuracy_can_be_read(layer: Path, tmp_path: Path) -> None:
    """A run that ends between 92 and 94 % has an axis about that range, whatever lies before it."""
    run = copy_run(layer, tmp_path / "long")
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    config = json.loads((run / "config.json").read_text())
    config["recipe"]["run"]["epochs"] = 60
    (run / "config.json").write_text(json.dumps(config))
    accuracies = [0.1 + 0.02 * i for i in range(40)] + [0.92 + 0.001 * i for i in range(20)]
    accuracies[45] = 0.5  # a drop in between
    lines = [
        {**line, "epoch": epoch, "eval": {**line["eval"], "accuracy": value}}
        for epoch, value in enumerate(accuracies, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = charts(write_report([run]).read_text())
    whole = re.findall(r'text-anchor="end">([\d.]+)%<', drawn["Accuracy"])
    assert min(map(float, whole)) <= 10 and max(map(float, whole)) >= 93.9
    part = re.findall(r'text-anchor="end">([\d.]+)%<', drawn["Accuracy, from epoch 41 (1 lower value not shown)"])
    assert 91 <= min(map(float, part)) <= 92 and 93.9 <= max(map(float, part)) <= 95
    assert len(part) >= 4
    assert ">93.9%</text>" in drawn["Accuracy"]


def test_a_busy_machine_is_named(layer: Path, tmp_path: Path) -> None:
    run = copy_run(layer, tmp_path / "busy")
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["rows"].values():
        row["latency_ms_quartiles"] = row["images_per_second_quartiles"] = None
        row["load_average"] = 0.0
    (run / "summary.json").write_text(json.dumps(summary))
    assert 'class="doubt"' not in write_report([run]).read_text()
    summary["rows"]["compact"].update(latency_ms=1.0, latency_ms_quartiles=[0.9, 1.3], load_average=1000.0)
    (run / "summary.json").write_text(json.dumps(summary))
    text = write_report([run]).read_text()
    (said,) = re.findall(r'<p class="doubt">(.*?)</p>', text, re.S)
    assert "40% (compact)" in said and "load average was 1000.0 on" in said
    rows = {row[0]: row[1] for row in read_tables(run / "report.html")[-2]}
    assert rows["load average"].startswith("1000.00")


def test_how_to_load_the_network(layer: Path, tmp_path: Path) -> None:
    """The code on the page runs, and gives the label that the network gives."""
    run = copy_run(layer, tmp_path / "loaded")

    def code() -> str:
        (found,) = re.findall(r"<pre[^>]*><code>(.*?)</code>", write_report([run]).read_text(), re.S)
        return html.unescape(found)

    summary = json.loads((run / "summary.json").read_text())
    known = summary.pop("preprocessing")  # as before it was written down
    (run / "summary.json").write_text(json.dumps(summary))
    assert "mean=[...]" in code() and "does not say: mean and std" in (run / "report.html").read_text()
    data = load_dataset("digits")
    assert (known["mean"], known["std"]) == (list(data.mean), list(data.std))
    names = [f"digit {i}" for i in range(10)]
    summary["preprocessing"] = {"mean": data.mean, "std": data.std, "class_names": names}
    (run / "summary.json").write_text(json.dumps(summary))
    text = code()
    assert "does not say" not in (run / "report.html").read_text()
    image = Image.fromarray(data.test.images[0, 0].numpy())
    scope: dict[str, Any] = {"image": image}
    with redirect_stdout(StringIO()) as out:
        exec(text, scope)
    x = ((data.test.images[:1].float() / 255) - data.mean[0]) / data.std[0]
    expected = fg.load(run / "model.safetensors")(x)
    torch.testing.assert_close(scope["scores"], expected, rtol=1e-4, atol=1e-4)  # the code has six digits of the mean
    assert out.getvalue() == f"digit {int(expected.argmax())}\n"


def test_how_to_load_a_network_of_own_images(tmp_path: Path) -> None:
    """Pictures that are not square come out as they did in training."""
    for label, (width, height) in enumerate([(40, 20), (21, 50)]):
        (tmp_path / f"train/{label}").mkdir(parents=True)
        picture = Image.fromarray(draw(label, width, height))
        for i in range(2):
            picture.save(tmp_path / f"train/{label}/{i}.png")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    data = load_data(f"folder:{tmp_path}", image_size=16, workers=0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2)).eval()
    fg.save(network, tmp_path / "model.safetensors")
    summary = {"image_size": list(data.image_size), "preprocessing": describe_data(data)}
    told = explain_loading(RunRecord(tmp_path, cast(Any, None), {}, [], summary, None, {}))
    assert told is not None and told["missing"] == []
    expected = torch.cat([network(x) for x, _ in data.evaluation("test", 1)])
    got = []
    for path in sorted((tmp_path / "test").rglob("*.png")):
        scope: dict[str, Any] = {"image": Image.open(path)}
        with redirect_stdout(StringIO()):
            exec(told["code"], scope)
        got.append(scope["scores"])
    torch.testing.assert_close(torch.cat(got), expected, rtol=1e-4, atol=1e-4)  # the code has six digits of the mean


def test_every_gate_has_its_row(layer: Path, channel: Path) -> None:
    page = write_report([layer, channel])
    tables = [table for table in read_tables(page) if table[0][:2] == ["#", "gate"]]
    for folder, table in zip((layer, channel), tables, strict=True):
        recipe = change(TINY, gating=folder.name)
        decisions = fg.Decisions.from_json(folder / "decisions.json")
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["gates"]
        costs = fg.gate_costs(build_network(recipe, (1, 8, 8), 10), (1, 8, 8))
        header, *rows = table
        assert [f"{row[1]}.gate" for row in rows] == list(decisions)
        for row in rows:
            name, shown = f"{row[1]}.gate", dict(zip(header, row, strict=True))
            opened, total = int(decisions[name].open.sum()), decisions[name].open.numel()
            assert shown["open"] == f"{sum(last[name]) / total:.1%}"
            assert shown["unanimity"] == f"{float(decisions[name].unanimity.min()):.1%}"
            assert float(shown["MACs"].split()[0]) == pytest.approx(int(costs[name].sum()) / 1e3, rel=5e-3)
            if folder is channel:
                assert (shown["channels"], shown["decision"]) == (str(total), f"{opened} of {total} open")
            else:
                assert shown["decision"] == ("open" if opened else "closed")


def test_conditions_stand_side_by_side(layer: Path, channel: Path) -> None:
    page = write_report([layer, channel], layer.parent / "both.html")
    conditions, recipe = read_tables(page)[-2:]
    rows = {row[0]: row[1:] for row in conditions + recipe}
    assert rows[""] == ["layer", "channel"]
    assert rows["command"] == ["fastgate train --output 'a <b> & c'", "not recorded"]
    assert rows["seed"] == ["1", "2"] and rows["gating"] == ["layer", "channel"]
    assert rows["device"] == ["cpu", "cpu"]
    assert all(f"torch {torch.__version__.split('+')[0]}" in text for text in rows["versions"])
    assert '<tr class="differs"><th>seed</th>' in page.read_text()
    assert "<tr><th>precision</th>" in page.read_text()


def test_a_report_draws_no_random_numbers(layer: Path) -> None:
    before = torch.get_rng_state()
    write_report([layer])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_in_progress(layer: Path, tmp_path: Path) -> None:
    run = tmp_path / "going"
    shutil.copytree(layer, run)
    for name in ("summary.json", "decisions.json", "model.safetensors"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    page = write_report([run])
    assert "not finished: 2 of 4 epochs are done" in page.read_text()
    header, _, control, gated = read_tables(page)[0]
    assert (control[0], gated[0]) == ("unpruned", "gated")
    assert gated[header.index("top-1")] == f"{json.loads(lines[1])['eval']['accuracy']:.2%}"
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "control-unpruned")
    text = write_report([run]).read_text()
    assert "not finished: 0 of 4 epochs are done" in text and "Energy: no epoch is finished." in text


def test_wrong_folders_are_refused(layer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected different runs"):
        write_report([layer, layer])
    with pytest.raises(ValueError, match=r"expected a run folder with config.json, found none"):
        write_report([layer, tmp_path])
    other = copy_run(layer, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["recipe"]["data"]["dataset"] = "cifar10"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected runs on one data set, got .*layer \(digits\), .*other \(cifar10\)"):
        write_report([layer, other])
    del config["recipe"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected the configuration of a run with its recipe, got none"):
        write_report([other])
    cut = copy_run(layer, tmp_path / "cut")
    (cut / "metrics.jsonl").write_text('{"epoch": 1')
    with pytest.raises(ValueError, match=r"metrics.jsonl: expected a JSON object per line, got .*damaged"):
        write_report([cut])
    assert not any((folder / "report.html").exists() for folder in (tmp_path, other, cut))


def test_the_page_asks_for_nothing_else(layer: Path) -> None:
    text = write_report([layer]).read_text()
    assert not re.search(r"https?:|//[a-z]|\b(src|href)=|url\(|@import|\bfetch\(", text)
    assert "default-src 'none'" in text  # and a browser would refuse to load anything


# what a reader would do: sort by a column twice, point at a chart
LOOK = """
const shown = element => { const box = element.getBoundingClientRect(); return box.width > 20 && box.height > 20; };
const table = document.querySelector(".sortable"), column = [...table.tHead.rows[0].cells].findIndex(
  header => header.textContent === "MACs");
const keys = () => [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.key));
const button = table.tHead.rows[0].cells[column].querySelector("button");
button.click(); const rising = keys(); button.click(); const falling = keys();
const chart = document.querySelector(".chart"), box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 1, clientY: box.top + 5 }));
const texts = [...chart.querySelectorAll(".tick")].map(text => text.getBoundingClientRect());
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
return {
  charts: [...document.querySelectorAll("svg.chart")].map(svg => shown(svg) && [...svg.querySelectorAll("polyline")]
    .every(curve => curve.getTotalLength() > 20 && getComputedStyle(curve).stroke.startsWith("rgb("))),
  maps: [...document.querySelectorAll(".map svg")].map(svg => shown(svg) && svg.querySelectorAll("path").length > 1),
  rising, falling, sorted: table.querySelector("[aria-sort]").textContent,
  readout: document.querySelector("output").textContent,
  overlaps: texts.some((a, i) => texts.some((b, j) => i < j && overlap(a, b))),
  requests: performance.getEntriesByType("resource").length,
  width: innerWidth, page: document.documentElement.scrollWidth,
  escaped: document.body.textContent.includes("'a <b> & c'"),
  background: getComputedStyle(document.body).backgroundColor,
};
"""


@in_browser
def test_a_browser_shows_everything(layer: Path, channel: Path) -> None:
    page = write_report([layer, channel])
    seen, errors = inspect_page(page, LOOK)
    assert errors == []
    assert seen["charts"] == [True] * 10 and seen["maps"] == [True] * 2
    assert seen["rising"] == sorted(seen["rising"]) and len(set(seen["rising"])) > 1
    assert seen["falling"] == sorted(seen["rising"], reverse=True)
    assert seen["sorted"] == "MACs"
    assert seen["readout"].count("epoch 4: ") == 3
    assert not seen["overlaps"]
    assert seen["requests"] == 0
    assert seen["escaped"]
    dark, _ = inspect_page(page, LOOK, dark=True)
    assert dark["background"] != seen["background"]


@in_browser
def test_a_phone_does_not_scroll_sideways(layer: Path, channel: Path) -> None:
    page = write_report([layer, channel])
    page.write_text(page.read_text().replace("<details>", "<details open>"))
    seen, _ = inspect_page(page, LOOK, width=360)
    assert seen["width"] == 360
    assert seen["page"] <= 360


SCROLLED = """
const wide = [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth + 1);
return wide.map(box => {
  const style = getComputedStyle(box);
  return { focusable: box.tabIndex === 0, shadows: style.backgroundImage.split("linear-gradient").length - 1,
    moves: style.backgroundAttachment, card: getComputedStyle(box.closest(".card")).backgroundColor,
    cover: style.backgroundImage.match(/rgb\\([^)]*\\)/)[0] };
});
"""


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_that_a_table_goes_on(layer: Path, dark: bool) -> None:
    """Shadows at both sides stay; what covers them at the table's ends has the card's colour and scrolls away."""
    wide, errors = inspect_page(write_report([layer]), SCROLLED, width=390, dark=dark)
    assert errors == [] and wide
    for box in wide:
        assert box["focusable"] and box["shadows"] == 4
        assert box["moves"] == "local, local, scroll, scroll"
        assert box["cover"] == box["card"]


@in_browser
def test_the_console_is_really_read(layer: Path) -> None:
    _, errors = inspect_page(write_report([layer]), 'fetch("file:///etc/hostname"); console.error("no"); return 1;')
    assert len(errors) >= 2  # the page's policy refuses the request
