"""The command line, called as a program would be."""

from __future__ import annotations

import io
import json
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.cli import main
from tests.reference import make_adapter

ASSETS = Path(jlora.__file__).parent / "demo_assets"
SMALL = [
    "--enforce-eager",
    "--max-model-len=64",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=32",
    "--temperature=0",
]


def lora(name):
    """--lora for an adapter of the demo."""
    return f"--lora={name}={ASSETS / 'adapters' / name}"


def generate(capsys, *arguments, code=0):
    """Runs `jlora generate` on the demo model; -> JSON lines, what it said on standard error."""
    assert main(["generate", str(ASSETS / "base"), *arguments]) == code
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def texts(rows):
    """The first answer of each line."""
    return [row["outputs"][0]["text"] for row in rows]


def test_prompts_as_arguments_with_an_adapter_for_all(capsys):
    rows, _ = generate(capsys, "hello =", "open book =", lora("upper"), "--use=upper", *SMALL)
    assert texts(rows) == ["HELLO", "OPEN BOOK"]
    assert [row["lora"] for row in rows] == ["upper", "upper"]


def test_jsonl_names_adapter_and_options_for_each_line(capsys, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "hello =", "lora": "rot13"},
        {"prompt": "hello =", "max_tokens": 2},
        {"prompt_token_ids": [1, 80, 85, 237], "n": 2},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    rows, _ = generate(
        capsys, f"--prompts={file}", f"--out={out}", lora("rot13"), *SMALL, "--max-tokens=8"
    )
    assert rows == []
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert texts(rows)[:2] == ["uryyb", "he"]
    assert len(rows[2]["outputs"]) == 2
    assert rows[1]["outputs"][0]["finish_reason"] == "length"


def test_what_the_adapters_need_is_reserved(capsys, tmp_path):
    base = ASSETS / "base"
    make_adapter(base, tmp_path / "dora", r=20, target_modules=["q_proj"], use_dora=True)
    make_adapter(base, tmp_path / "head", size=0, r=2, target_modules=["lm_head"])
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "hello =", "lora": name} for name in ("dora", "head", "upper")]
    file.write_text("\n".join(map(json.dumps, lines)))
    loras = [f"--lora={name}={tmp_path / name}" for name in ("dora", "head")]
    rows, _ = generate(capsys, f"--prompts={file}", *loras, lora("upper"), *SMALL)
    assert [row["lora"] for row in rows] == ["dora", "head", "upper"]
    assert texts(rows)[1:] == ["hello", "HELLO"]


def test_standard_input_one_prompt_a_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abc =\n\nxyz =\n"))
    rows, _ = generate(capsys, *SMALL)
    assert texts(rows) == ["abc", "xyz"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--lora=upper"], "NAME=PATH"),
        (["x", "--use=upper"], "adapter 'upper' is not among"),
        (["x", "--lora=a=/does/not/exist"], "/does/not/exist is not a folder"),
        (["x", "--max-tokens=0"], "max_tokens must be an integer of at least 1"),
        (["x", "--prompts=y"], "not both"),
        (["--prompts=/does/not/exist.jsonl"], "/does/not/exist.jsonl"),
    ],
)
def test_bad_input_is_said_and_exits_with_2(capsys, arguments, said):
    _, error = generate(capsys, *arguments, *SMALL, code=2)
    assert error.startswith("jlora: ")
    assert said in error


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "x"}', "line 1 must be an object with prompt"),
        ('{"prompt": "x", "temprature": 1}', "temprature"),
        ('{"prompt": "x", "lora": "nobody"}', "'nobody'"),
    ],
)
def test_bad_lines_are_named(capsys, tmp_path, line, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    _, error = generate(capsys, f"--prompts={file}", *SMALL, code=2)
    assert said in error


def test_options_may_stand_between_model_and_prompt(capsys):
    assert main(["generate", str(ASSETS / "base"), *SMALL, "hello ="]) == 0
    assert texts([json.loads(capsys.readouterr().out)]) == ["hello"]


def test_unknown_options_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["generate", str(ASSETS / "base"), "x", "--beam-width=4"])
    assert "--beam-width=4" in capsys.readouterr().err


def test_a_converted_model_with_an_adapter_of_a_jax_trainer(capsys, tmp_path):
    out = tmp_path / "converted"
    assert main(["convert", str(ASSETS / "base"), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    arrays = load_file(ASSETS / "adapters" / "upper" / "adapter_model.safetensors")
    config = json.loads((ASSETS / "adapters" / "upper" / "adapter_config.json").read_text())
    orbax = tmp_path / "upper"
    orbax.mkdir()
    (orbax / "jlora_adapter.json").write_text(json.dumps({"lora_alpha": config["lora_alpha"]}))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = {
            name.removeprefix("base_model.model.").removesuffix(".weight").lower(): array.T
            for name, array in arrays.items()
        }
        checkpointer.save(orbax / "adapter", ocp.args.PyTreeSave(tree))
    assert main(["generate", str(out), "hello =", f"--lora=up={orbax}", "--use=up", *SMALL]) == 0
    assert texts([json.loads(capsys.readouterr().out)]) == ["HELLO"]


def test_a_conversion_that_is_refused_says_why(capsys, tmp_path):
    (tmp_path / "mine").write_text("")
    assert main(["convert", str(ASSETS / "base"), str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["convert", str(ASSETS / "base"), str(tmp_path / "out"), "--dtype=int8"]) == 2
    assert "int8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_the_first_host_reads_prompts(monkeypatch):
    followed = []
    monkeypatch.setattr(jlora, "follow", followed.append)
    monkeypatch.setattr("jlora.cli._leads", lambda where, options: False)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    base = str(ASSETS / "base")
    assert main(["generate", base, lora("upper"), "--prompts=nowhere.jsonl", "--distributed"]) == 0
    assert main(["generate", base, "--distributed"]) == 0
    assert [args.model for args in followed] == [base, base]
    assert [args.enable_lora for args in followed] == [True, False]


@pytest.mark.parametrize("where", [["{base}"], ["host:1,2", "{base}"], ["host:1,two,0", "{base}"]])
def test_where_the_first_host_is(capsys, where):
    """--distributed takes the model for it when that stands behind."""
    told = [one.format(base=ASSETS / "base") for one in where]
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "--distributed", *told])
    assert exit_.value.code == 2
    assert f"{told[0]} is not HOST:PORT,COUNT,INDEX" in capsys.readouterr().err
