"""The report on made-up tables of every family: its HTML is sound, and a browser draws all of it."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sbeval import registry
from sbeval.errors import InputError
from sbeval.report import html, page
from sbeval.report.claims import CLAIMS
from sbeval.report.figures import draw_figures
from sbeval.report.judge import UNDECIDED, Finding, Judged
from sbeval.tables import curves
from sbeval.tables.results import Results
from sbeval.tables.run_files import Runs
from sbeval.tables.table import read

graph_objects: Any = pytest.importorskip("plotly.graph_objects")

Row = dict[str, Any]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
METHODS = ("stick_breaking", "rope", "alibi<b>")
COMMON: Row = {
    "model": "25m",
    "options": "",
    "params": 25_000_000,
    "train_len": 512,
    "eval_len": 2048,
    "unit": "1",
    "n": 100,
    "preset": "h200",
    "corpus": "books & plays",
    "tokenizer": "bpe:8192",
    "train_tokens": 10**8,
    "dtype": "bfloat16",
    "device": "NVIDIA H200",
    "backend": "triton",
    "commit": "abc",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "utc": "2026-01-02T03:04:05Z",
}
OCTAVES = [2**exponent for exponent in range(5, 11)]


def length_gen(run: Row, place: int) -> Iterator[Row]:
    run |= {"task": "books", "position_start": "", "position_end": "", "context_length": "", "last_k": ""}
    for length in (256, 512, 1024, 2048):
        yield run | {"metric": "perplexity", "value": 40 + place * length / 512, "context_length": length}
    for length in (512, 1024, 2048):
        yield run | {"metric": "loss_fixed_targets", "context_length": length, "targets": 256, "value": 3.0 + place}
    for tokens in (10**7, 10**8, 10**9, 10**10):
        at = {"context_length": 512, "train_tokens": tokens, "corpus": "plays"}
        yield run | at | {"metric": "perplexity", "value": 40 + place * 10**8 / tokens}
    for rate in (1e-3, 2e-3):
        at = {"context_length": 512, "lr": rate, "optimizer": "adamw", "batch_tokens": 512, "schedule": "cosine"}
        yield run | at | {"metric": "perplexity", "value": 40 + place * rate, "corpus": "songs"}
    for start in OCTAVES:
        loss = 3.5 + place * start / 1024
        yield run | {"metric": "loss", "value": loss, "position_start": start, "position_end": 2 * start}


def mqrar(run: Row, place: int) -> Iterator[Row]:
    run |= {
        "task": "mqrar",
        "model": "2x64",
        "vocab_size": 64,
        "seq_len": 64,
        "width": 64,
        "layers": 2,
        "heads": 1,
        "lr": 0.001,
        "metric": "accuracy",
        "stale_values": "",
        "distance_start": "",
        "distance_end": "",
        "split": "",
    }
    for pairs in (4, 8, 16):
        at = run | {"kv_pairs": pairs, "value": 0.99 / (1 + place * pairs / 32)}
        yield from (at | {"split": split} for split in ("all", "fresh", "stale"))
        yield from (at | {"stale_values": count} for count in (0, 1, 2))
        yield from (at | {"distance_start": start, "distance_end": 2 * start} for start in (1, 2, 4))
        ended = {"metric": "steps", "value": 100 * pairs, "status": "solved", "cell": f"{run['cell']}-{pairs}"}
        yield at | ended


def needle(run: Row, place: int) -> Iterator[Row]:
    run |= {"metric": "score", "finetune_tokens": 0, "depth_start": "", "depth_end": ""}
    for task, length in itertools.product(("vt", "cwe", "niah_single_1"), (512, 1024, 2048)):
        yield run | {"task": task, "length": length, "value": 1 / (1 + place)}
    for depth, length in itertools.product((0, 50), (512, 1024)):
        where = {"depth_start": depth, "depth_end": depth + 50, "length": length}
        yield run | where | {"task": "niah_single_1", "value": depth / length}


def few_shot(run: Row, place: int) -> Iterator[Row]:
    run |= {"metric": "acc", "part": "", "filter": "", "shots": 0, "version": "1", "items": "hub", "cut": 0}
    for task, chance in (("arc_easy", 0.25), ("copa", 0.5), ("piqa", 0.5)):
        yield run | {"task": task, "chance": chance, "value": 0.6 - place / 50}


def flip_flop(run: Row, place: int) -> Iterator[Row]:
    run |= {
        "task": "flip_flop",
        "model": "1x64",
        "seq_len": 512,
        "heads": 2,
        "p_train": 0.8,
        "lr": 0.001,
        "reads": 1000,
        "metric": "error_rate",
        "distance_start": "",
        "distance_end": "",
    }
    for test, chance in (("validation", 0.8), ("in_distribution", 0.8), ("sparse", 0.98), ("dense", 0.1)):
        yield run | {"test": test, "p_ignore": chance, "value": place * chance / 10}
    for start in (1, 2, 4):
        where = {"test": "sparse", "p_ignore": 0.98, "distance_start": start, "distance_end": 2 * start}
        yield run | where | {"value": place * start / 50}


def model(run: Row, place: int) -> Iterator[Row]:
    run |= {"metric": "throughput", "batch": 4, "queries": 4096, "head_dim": 64, "stderr": ""}
    for size, params in (("350m", 35 * 10**7), ("1b", 10**9)):
        for step, scale in (("train", 1), ("evaluate", 3)):
            speed = scale * 1e14 / params / (1 + place / 10)
            yield run | {"task": step, "step": step, "model": size, "params": params, "value": speed}


def kernel(run: Row, place: int) -> Iterator[Row]:
    backend = "triton" if run["attention"] == "stick_breaking" else "flash"
    run |= {
        "model": "",
        "params": 0,
        "batch": 1,
        "heads": 12,
        "kv_heads": 12,
        "sequences": 1,
        "epsilon": 0.0,
        "stderr": "",
        "attention": "softmax" if place else "stick_breaking",
        "backend": backend,
    }
    for step, dim, queries in itertools.product(("forward", "forward_backward"), (64, 128), (4096, 16384)):
        at = run | {"task": step, "step": step, "head_dim": dim, "queries": queries, "keys": queries}
        numbers = {"time": 2.0 + place, "time_q20": 1.9 + place, "time_q80": 2.1 + place, "throughput": 300 - place}
        yield from (at | {"metric": name, "value": value} for name, value in numbers.items())
        yield at | {"metric": "relative_error", "value": 0.002}


def attention_map(run: Row, place: int) -> Iterator[Row]:
    run |= {
        "task": "mqrar",
        "model": "1x8",
        "kv_pairs": 2,
        "seq_len": 4,
        "vocab_size": 10,
        "layers": 1,
        "heads": 1,
        "layer": "",
        "head": "",
        "query": "",
        "key": "",
        "target": "",
        "split": "",
    }
    yield run | {"metric": "accuracy", "split": "stale", "value": 0.5}
    yield from (run | {"metric": "token", "key": key, "value": token} for key, token in enumerate((1, 7, 1, 6)))
    for target in ("latest", "stale"):
        yield run | {"metric": "share", "layer": 1, "head": 1, "target": target, "split": "stale", "value": 0.25}
    for query, key, target in ((2, 1, "latest"), (3, 0, ""), (3, 3, "stale")):
        yield run | {
            "metric": "weight",
            "layer": 1,
            "head": 1,
            "query": query,
            "key": key,
            "target": target,
            "value": 0.5,
        }


def skipping(run: Row, place: int) -> Iterator[Row]:
    backend = "cudnn" if place else "triton"
    run |= {
        "model": "m",
        "params": 10**7,
        "batch": 1,
        "attention": "softmax" if place else "stick_breaking",
        "backend": backend,
        "metric": "time",
        "layer": 0,
        "stderr": "",
    }
    for step, keys in itertools.product(("forward", "decode"), (4096, 16384)):
        for epsilon in (0.0, 1e-7)[: 1 if place else 2]:
            yield run | {"step": step, "task": step, "keys": keys, "epsilon": epsilon, "value": 1.0 + place}


def diagnostics(run: Row, place: int) -> Iterator[Row]:
    run |= {"task": "books", "distance": "", "layer": "", "head": "", "heads": ""}
    run |= {"lr": 2e-3, "optimizer": "adamw", "batch_tokens": 131072, "schedule": "cosine"}
    for seen in (5 * 10**6, 10**8):
        yield run | {"metric": "in_context_score", "value": -0.1 * place, "tokens_seen": seen}
        for distance in (64, 256):
            yield run | {"metric": "copy_gain", "value": place, "tokens_seen": seen, "distance": distance}
        for heads in ("mean", "highest"):
            of_heads = run | {"value": 0.1 * place, "tokens_seen": seen, "heads": heads, "distance": 64}
            yield from (of_heads | {"metric": metric} for metric in ("prefix_matching", "weight_beyond"))


FAMILIES = {
    each.__name__: each
    for each in (attention_map, diagnostics, few_shot, flip_flop, kernel, length_gen, model, mqrar, needle, skipping)
}


CURVES: curves.Curves = {name: [(1, 3.0), (2, 2.0)] for name in ("loss", "held_out_loss", "validation_accuracy")}


def tables(folder: Path, families: Sequence[str] = tuple(FAMILIES), seeds: Sequence[int] = (0, 1)) -> Path:
    """Write the table of each family, and the run files of its cells."""
    (folder / "runs").mkdir()
    for name in families:
        rows: list[Row] = []
        # one kernel of each kind, timed once
        for place, (method, seed) in enumerate(itertools.product(METHODS, seeds)):
            if name in ("kernel", "model", "attention_map", "skipping") and (seed or place > 2 * len(seeds)):
                continue
            cell = f"{name}-{method}-{seed}"
            run = COMMON | {"family": name, "attention": method, "seed": seed, "cell": cell, "stderr": 0.05, "task": ""}
            rows += FAMILIES[name](run, place // len(seeds))
            record = {
                "argv": ["sbeval", name, "--corpus", "a b"],
                "corpus_digest": "d1",
                "versions": {"python": "3.12"},
                "files": {"curves": curves.write(Results(folder), cell, CURVES)}
                if name in ("length_gen", "mqrar")
                else {},
            }
            (folder / "runs" / f"{cell}.json").write_text(json.dumps(record))
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    return folder


class Page(HTMLParser):
    """What a page is made of: its elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        inside = self.elements[-1] if self.elements else ("", {})
        (self.scripts if inside[1].get("type") == "application/json" else self.text).append(data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]

    def plots(self) -> list[Row]:
        return [json.loads(script) for script in self.scripts if script.startswith("{")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tables(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def text(results: Path) -> str:
    return html.build(results, say=pytest.fail)


def test_every_figure_has_a_section_and_every_link_a_target(text: str) -> None:
    found = Page(text)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    links = found.values("href")
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert [link for link in links if not link.startswith("#")] == ["data:,"] and not found.values("src")
    assert {f"figure-{name.replace('_', '-')}" for name in registry.FIGURES} <= set(ids)
    assert [attributes["aria-labelledby"] for attributes in found.all("figure")] == [
        f"{name}-title" for name in ids if name.startswith("figure-") and not name.endswith("-title")
    ]
    # findings stand before all figures, the paper's claims before what is asked of our own kernel
    assert text.index('id="findings"') < text.index('id="own"') < text.index("<figure")


def test_claims_are_counted_without_our_own_measurements(results: Path, text: str, tmp_path: Path) -> None:
    claims, own = text.partition('id="own"')[::2]
    assert "Of 7 claims" in claims and "FlashAttention-2, forward?" not in claims
    assert "FlashAttention-2, forward?" in own.partition("</section>")[0]
    assert "are not measured here" not in text and "Not measured here" not in text
    # with one table alone the claims of others are named, not judged
    shutil.copy(results / "mqrar.csv", tmp_path)
    alone = html.build(tmp_path, say=pytest.fail)
    assert "6 are not measured here" in alone and 'id="own"' not in alone
    missing = alone.partition("Not measured here")[2].partition("</section>")[0]
    assert missing.count("<li>") == 6 and "sbeval few-shot" in missing


def test_a_finding_stands_first_and_what_it_rests_on_below_in_small_print(text: str) -> None:
    rows = text.partition('id="findings"')[2].partition("</section>")[0].split("</tr>")
    (within,) = (row for row in rows if "Within the training length stick-breaking is" in row)
    found, *basis = re.split('<p class="soft basis">', within.partition("</th><td>")[2].partition("</td>")[0])
    assert "Perplexity at 512 tokens: stick-breaking 40.0, RoPE 40.0; difference " in found
    assert "seed" not in found and "Holm" not in found
    assert len(basis) == 1 and re.fullmatch(
        "Difference: 95&nbsp;% over 2 seeds each.* Holm .* a parameter\\.</p>", basis[0]
    )


def test_a_reason_ends_with_one_full_stop() -> None:
    for reason in ("one seed", " One seed."):
        finding = Finding(CLAIMS[0], Judged(UNDECIDED, "Found.", reason=reason))
        assert '<td>Found. <span class="soft">One seed.</span></td>' in html._finding(finding, {})


def test_a_reader_who_sees_nothing_is_served(text: str) -> None:
    found = Page(text)
    plots = [attributes for attributes in found.all("div") if attributes.get("class") == "plot"]
    assert len(plots) == len(found.plots()) > len(registry.FIGURES)
    assert all(len(attributes["aria-label"]) > 20 for attributes in plots)
    assert len(found.all("table")) == len(found.all("caption"))
    assert all(attributes.get("scope") in ("row", "col") for attributes in found.all("th"))
    assert all(attributes["aria-pressed"] == "true" for attributes in found.all("button"))
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert found.all("html")[0]["lang"] == "en" and len(found.all("main")) == len(found.all("nav")) == 1


@pytest.mark.parametrize("name", registry.FIGURES)
def test_every_figure_can_be_a_page_of_its_own(name: str, results: Path, text: str, tmp_path: Path) -> None:
    (file,) = draw_figures(results, [name], ["html"], out_dir=tmp_path)
    found = Page(file.read_text())
    assert file.name == f"{name}.html" and found.plots() and not found.values("href")[1:]
    # as in the report
    assert all(
        json.dumps(plot, separators=(",", ":"), ensure_ascii=False) in text.replace("\\u003c", "<")
        for plot in found.plots()
    )
    assert len(found.all("h1")) == 1 and {"figure-title"} <= set(found.values("id"))


def test_plotly_knows_all_that_is_drawn(text: str) -> None:
    for plot in Page(text).plots():
        graph_objects.Figure(data=plot["data"], layout=plot["layout"])


def test_a_line_its_table_and_its_words_hold_the_numbers_of_the_rows(results: Path) -> None:
    table = read(results / "length_gen.csv", registry.figure("length_gen").COLUMNS)
    chart = registry.figure("length_gen").chart(table)
    (panel,) = chart.groups[0].panels
    rope = next(trace for trace in panel.plotly()["data"] if trace["meta"] == "RoPE" and "lines+" in trace["mode"])
    assert rope["x"] == [256, 512, 1024, 2048] and rope["y"] == pytest.approx([40.5, 41, 42, 44])
    assert "RoPE 40.5 at 256 to 44 at 2048" in panel.words()
    rows = panel.rows()
    assert rows[rows["method"] == "RoPE"]["perplexity (per token)"].tolist() == pytest.approx([40.5, 41, 42, 44])


def test_models_that_overfit_are_named_and_decide_nothing(text: str, tmp_path: Path) -> None:
    folder = tables(tmp_path, ["length_gen"])
    rows = pd.read_csv(folder / "length_gen.csv", dtype=str, keep_default_na=False)
    rows.assign(status=rows["attention"].map(lambda name: "overfit" if name == "rope" else "")).to_csv(
        folder / "length_gen.csv", index=False
    )
    marked = html.build(folder, say=pytest.fail)
    # both claims of the table, and its three figures
    assert marked.count("Left out, as they overfit: models of rope") + marked.count("; left out, as they overfit") == 2
    assert marked.count("above its lowest): RoPE.") == 3 and "verfit" not in text


def test_text_of_tables_is_text(text: str) -> None:
    found = Page(text)
    assert "alibi<b>" not in text and not [tag for tag, _ in found.elements if tag == "b"]
    assert any("alibi<b>" in part for part in found.text) and "books & plays (d1)" in "".join(found.text)
    assert "sbeval needle --corpus 'a b'" in "".join(found.text)
    hovers = [line for plot in found.plots() for trace in plot["data"] for line in trace.get("text", [])]
    assert any("<b>alibi&lt;b&gt;</b>" in line for line in hovers)


def test_the_same_tables_make_the_same_page(tmp_path: Path) -> None:
    out = html.write(tables(tmp_path, ["mqrar"]))
    assert out == tmp_path / "report.html" and out.read_text() == html.build(tmp_path)


def test_a_page_that_cannot_be_made_leaves_the_old_one(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    monkeypatch.setattr(html, "build", lambda *_: "\udc80")
    with pytest.raises(UnicodeEncodeError):
        html.write(results, out)
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["page.html"]
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match="needs the plotly package"):
        page.document("", "")


def test_what_is_not_there_has_no_section(results: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no result table in .*; sbeval length-gen"):
        html.build(tmp_path)
    kernels = pd.read_csv(results / "kernel.csv", keep_default_na=False)
    kernels[kernels["metric"] != "relative_error"].to_csv(tmp_path / "kernel.csv", index=False)
    said: list[str] = []
    found = Page(html.build(tmp_path, said.append))
    assert [name for name in found.values("id") if re.fullmatch("figure-.*(?<!-title)", name)] == ["figure-kernel"]
    assert len(said) == 1 and said[0].startswith("kernel_error: skipped, ")
    # without run files there is no command line and no version of Python
    assert "3 runs; commit abc; NVIDIA H200; bfloat16; torch 2.11.0; triton 3.6.0; seed 0; books" in "".join(found.text)


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "jinja2"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from sbeval.cli.main import main
main()
"""


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    command = ["report", "--results-dir", str(tables(tmp_path, ["mqrar"])), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, *command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "page.html")), done.stderr


# in the page, before its own scripts: what went wrong, and in the end what is there
WATCH = """<script>
const wrong = [];
addEventListener("error", event => wrong.push(event.message));
addEventListener("unhandledrejection", event => wrong.push(String(event.reason)));
console.error = console.warn = (...words) => wrong.push(words.join(" "));
const waiting = setInterval(() => {
  const root = document.documentElement;
  if (!root.dataset.drawn) return;
  clearInterval(waiting);
  const places = [...document.querySelectorAll(".plot")];
  const empty = places.filter(place => !place.querySelector(".main-svg :is(.point, .hm image)"));
  const links = [...document.querySelectorAll("a[href^='#']")];
  const button = document.querySelector(".legend button"), group = button.closest(".group");
  button.click();
  const hidden = group.querySelector(".plot").data.filter(trace => trace.visible === false);
  parent.postMessage({
    wrong, width: innerWidth, wide: root.scrollWidth, places: places.length,
    empty: empty.map(place => place.getAttribute("aria-label")),
    dead: links.filter(link => !document.querySelector(link.hash)).map(link => link.hash),
    pressed: button.getAttribute("aria-pressed"), hidden: [...new Set(hidden.map(trace => trace.meta))],
  }, "*");
}, 50);
</script>"""
FRAMES = """<body><script>
const found = [];
addEventListener("message", event => { found.push(event.data); document.body.dataset.found = JSON.stringify(found); });
</script>
<iframe src="page.html" style="width:1280px;height:800px"></iframe>
<iframe src="page.html" style="width:360px;height:640px"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_figure_wide_and_narrow(text: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(text.replace("<head>", f"<head>{WATCH}", 1))
    (tmp_path / "frames.html").write_text(FRAMES)
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=30000",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    frames = sorted(json.loads(Page(done.stdout).values("data-found")[0]), key=lambda frame: frame["width"])
    assert [frame["width"] for frame in frames] == [360, 1280]
    for frame in frames:
        assert frame["wide"] <= frame["width"] and frame["places"] == len(Page(text).plots())
        assert frame["wrong"] == frame["empty"] == frame["dead"] == []
        assert frame["pressed"] == "false" and frame["hidden"] == ["stick-breaking"]


def test_a_figure_names_the_commands_of_its_rows() -> None:
    none, one, two, three = (
        Runs(pd.DataFrame(), [], ["sbeval mqrar", "sbeval run", "sbeval needle"][:n]) for n in range(4)
    )
    assert html._made_by(none) == ""
    assert html._made_by(one) == " Made by <code>sbeval mqrar</code>."
    assert html._made_by(two) == " Made by <code>sbeval mqrar</code> and <code>sbeval run</code>."
    assert html._made_by(three) == ' Made by <code>sbeval mqrar</code> and <a href="#again">2 more</a>.'
