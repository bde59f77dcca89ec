import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from sbeval import registry
from sbeval.errors import InputError
from sbeval.report import html
from sbeval.report.figures import draw_figures

MQRAR = """\
family,task,model,attention,options,params,train_len,eval_len,seed,metric,unit,value,stderr,n,kv_pairs,seq_len,\
vocab_size,width,layers,heads,lr,split,stale_values,distance_start,distance_end,cell,preset,corpus,tokenizer,train_tokens,dtype,device,backend,commit,torch,triton,utc
mqrar,mqrar,tiny,rope,,9,64,64,0,accuracy,1,0.5,0.01,100,4,64,64,32,2,1,0.001,all,,,,a,quick,,,9,float32,cpu,torch,c,2,3,u
mqrar,mqrar,tiny,rope,,9,64,64,0,accuracy,1,0.6,0.01,100,4,64,64,32,2,1,0.001,fresh,,,,a,quick,,,9,float32,cpu,torch,c,2,3,u
mqrar,mqrar,tiny,rope,,9,64,64,0,accuracy,1,0.4,0.01,100,4,64,64,32,2,1,0.001,stale,,,,a,quick,,,9,float32,cpu,torch,c,2,3,u
mqrar,mqrar,tiny,rope,,9,64,64,0,accuracy,1,0.4,0.01,100,4,64,64,32,2,1,0.001,,1,,,a,quick,,,9,float32,cpu,torch,c,2,3,u
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "mqrar.csv").write_text(MQRAR)
    return tmp_path


def test_figures_without_a_table_are_left_out_and_said(results: Path) -> None:
    said: list[str] = []
    files = draw_figures(results, say=said.append)
    names = ["mqrar.png", "mqrar.pdf", "mqrar_splits.png", "mqrar_splits.pdf"]
    assert files == [results / "figures" / name for name in names]
    assert files[0].read_bytes().startswith(b"\x89PNG") and files[1].read_bytes().startswith(b"%PDF")
    assert f"length_gen: skipped, no table {results / 'length_gen.csv'}" in said
    assert not any(line.startswith("mqrar") for line in said)
    assert sorted(path.name for path in (results / "figures").iterdir()) == sorted(names)


def test_a_folder_without_tables_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no result table in .*nowhere"):
        draw_figures(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_tables_without_figures_names_them(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("family\n")
    for work in (draw_figures, html.build):
        with pytest.raises(InputError, match="no figure known here is drawn from own.csv in .*; install the package"):
            work(tmp_path)


def test_settings_have_files_of_their_own(results: Path) -> None:
    larger = "".join(line.replace("64,64,32,2", "64,1024,32,2") for line in MQRAR.splitlines(keepends=True)[1:2])
    (results / "mqrar.csv").write_text(MQRAR + larger.replace(",a,quick", ",b,quick"))
    files = draw_figures(results, ["mqrar"], ["png", "html"] if importlib.util.find_spec("plotly") else ["png"])
    assert [file.name for file in files if file.suffix == ".png"] == ["mqrar.png", "mqrar-vocabulary-of-1024.png"]
    # the page has all
    assert [file.name for file in files if file.suffix == ".html"] in ([], ["mqrar.html"])


def test_drawn_again_the_files_are_the_same(results: Path) -> None:
    first = [file.read_bytes() for file in draw_figures(results, ["mqrar"], out_dir=results / "one")]
    # a folder of another length, so that no path can hide in the files
    second = [file.read_bytes() for file in draw_figures(results, ["mqrar"], out_dir=results / "another")]
    assert first == second
    assert b"Date" not in first[1] and matplotlib.__version__.encode() not in first[0] + first[1]


def test_drawing_leaves_no_global_state(results: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_figures(results, ["mqrar"], ["png"])
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before


def test_what_cannot_be_drawn_is_said(results: Path) -> None:
    for name, command in (("length_gen", "sbeval length-gen"), ("kernel", "sbeval bench kernel")):
        with pytest.raises(InputError, match=f"no table .*{name}.csv; {command} writes it"):
            draw_figures(results / "elsewhere", [name])
    # nothing is made where there is nothing to draw
    assert not (results / "elsewhere").exists()
    with pytest.raises(InputError, match="unknown format 'pngs'; did you mean 'png'"):
        draw_figures(results, ["mqrar"], ["pngs"])
    with pytest.raises(InputError, match="unknown figure 'mqar'; did you mean 'mqrar'"):
        draw_figures(results, ["mqar"])
    header = MQRAR.splitlines(keepends=True)[0]
    (results / "mqrar.csv").write_text(header)
    with pytest.raises(InputError, match="mqrar.csv: there are no rows"):
        draw_figures(results, ["mqrar"])
    # after a run, or where no figure is named, it is left out
    for names in (["mqrar"], None):
        said: list[str] = []
        assert draw_figures(results, names, say=said.append, required=False) == []
        assert "mqrar: left out, there are no rows with metric 'accuracy' and split 'all' to draw" in said
    (results / "mqrar.csv").write_text(header.replace("kv_pairs", "pairs"))
    with pytest.raises(InputError, match="mqrar.csv has no column 'kv_pairs'"):
        draw_figures(results, ["mqrar"])
    (results / "file").touch()
    with pytest.raises(InputError, match="cannot make the folder of figures .*; give another with --out"):
        draw_figures(results, ["mqrar"], out_dir=results / "file")


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from pathlib import Path
from sbeval.report.figures import draw_figures
print(*draw_figures(Path(sys.argv[1]), ["mqrar"], ["png"]))
"""


def test_figures_are_drawn_where_torch_cannot_be_imported(results: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", BLOCKED, str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(results / "figures" / "mqrar.png")), done.stderr


def test_what_a_killed_run_left_is_removed(results: Path) -> None:
    left = results / "figures" / f".mqrar.png.{'0' * 32}.tmp"
    left.parent.mkdir()
    left.touch()
    draw_figures(results, ["mqrar"], ["png"])
    assert [path.name for path in left.parent.iterdir()] == ["mqrar.png"]


def test_where_selects_rows(results: Path, tmp_path: Path) -> None:
    (results / "mqrar.csv").write_text(MQRAR + MQRAR.split("\n", 1)[1].replace(",rope,", ",alibi,"))
    everything = draw_figures(results, ["mqrar"], ["png"], tmp_path / "all")
    one = draw_figures(results, ["mqrar"], ["png"], tmp_path / "one", where=["attention=rope"])
    assert picture(everything[0]) != picture(one[0])
    # of several values of a column, any
    both = draw_figures(
        results, ["mqrar"], ["png"], tmp_path / "both", where=["attention=rope", "attention=alibi", "seed=0"]
    )
    assert picture(everything[0]) == picture(both[0])


def picture(file: Path) -> bytes:
    """Return a PNG without what comes before its pixels, which states the rows."""
    return file.read_bytes().partition(b"IDAT")[2]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("attention", "--where takes COLUMN=VALUE, such as seed=0; got 'attention'"),
        ("atention=rope", "did you mean 'attention'?"),
        ("attention=rop", "mqrar.csv: no row with attention=rop; attention is "),
        ("seed=77", "mqrar.csv: no row with seed=77"),
    ],
)
def test_where_names_what_selects_nothing(results: Path, tmp_path: Path, condition: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        draw_figures(results, ["mqrar"], ["png"], tmp_path, where=[condition])


def test_a_table_without_the_rows_or_a_damaged_one_does_not_keep_others_from_being_drawn(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    gather = registry.gather

    def torn(name: str, *given: Any) -> pd.DataFrame:
        if name == "mqrar_steps":
            raise InputError("curves/a.parquet is damaged")
        return gather(name, *given)

    monkeypatch.setattr(registry, "gather", torn)
    files = draw_figures(results, None, ["png"], say=said.append)
    assert "mqrar.png" in [path.name for path in files]
    assert f"mqrar_steps: skipped, {results / 'mqrar.csv'}: curves/a.parquet is damaged" in said
    # nothing at all is an error, as is a figure that is named
    with pytest.raises(InputError, match="no row with seed=77"):
        draw_figures(results, None, ["png"], say=said.append, where=["seed=77"])
    with pytest.raises(InputError, match="is damaged"):
        draw_figures(results, ["mqrar", "mqrar_steps"], ["png"], say=said.append)


@pytest.mark.parametrize(
    ("content", "said"), [("family,cell\n", "flip_flop.csv has no column"), ("", "is empty"), ('a\n"', "flip_flop.csv")]
)
def test_a_table_that_cannot_be_read_keeps_no_other_from_being_drawn(content: str, said: str, results: Path) -> None:
    path = results / "flip_flop.csv"
    path.write_text(content)
    lines: list[str] = []
    assert "mqrar.png" in [file.name for file in draw_figures(results, None, ["png"], say=lines.append)]
    (line,) = [line for line in lines if line.startswith("flip_flop: skipped, ")]
    assert said in line and line.count(str(path)) == 1
    with pytest.raises(InputError, match=said):
        draw_figures(results, ["mqrar", "flip_flop"], ["png"])


def test_a_dollar_in_a_name_begins_no_formula(results: Path) -> None:
    (results / "mqrar.csv").write_text(MQRAR.replace(",rope,", ",package.a$^$b,"))
    # as a formula it would be an error of matplotlib
    assert len(draw_figures(results, ["mqrar"], ["png"])) == 1
