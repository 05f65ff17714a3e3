"""The command line: answers, and one clear line with exit code 2 for whatever a user gets wrong."""

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
from jinja2 import TemplateError

from modeling_llava.cli import main
from modeling_llava.commands import answering, doctor
from processing_llava import load_image
from tests.tiny import TEXT_CONFIGS, VISION_CONFIGS, save_tiny_checkpoint, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "red.png"
    PIL.Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


def ask(*arguments: str, capsys) -> str:
    assert main(["ask", *arguments, "--max-new-tokens", "5"]) == 0
    return capsys.readouterr().out.strip()


def test_ask_gives_one_answer_from_every_kind_of_source(checkpoint, picture, capsys, monkeypatch):
    data = Path(picture).read_bytes()
    expected = ask(picture, "What is this?", "--model", checkpoint, capsys=capsys)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert ask(uri, "What is this?", "--model", checkpoint, capsys=capsys) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert ask("-", "What is this?", "--model", checkpoint, capsys=capsys) == expected
    stream = io.BytesIO(data + bytes(60_000_000))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
    assert main(["ask", "-", "What is this?", "--model", checkpoint]) == 2
    assert "expected at most 30000000" in capsys.readouterr().err and stream.tell() == 30_000_001
    record = json.loads(ask(picture, "What is this?", "--model", checkpoint, "--json", capsys=capsys))
    assert record["answer"].strip() == expected
    assert record["images"] == [picture]
    assert record["num_new_tokens"] > 0 and record["seconds_to_first_token"] > 0


def test_ask_takes_several_pictures_a_system_text_and_a_template(checkpoint, picture, capsys):
    arguments = [picture, picture, "Same?", "--model", checkpoint]
    plain = ask(*arguments, capsys=capsys)
    assert ask(*arguments, "--system", "Be brief.", "--template", "qwen", capsys=capsys) != plain


def test_ask_opens_pictures_up_to_limits_that_can_be_set(checkpoint, tmp_path, capsys):
    panorama = str(tmp_path / "panorama.png")
    PIL.Image.new("RGB", (900, 30), "red").save(panorama)
    arguments = ["ask", panorama, "What?", "--model", checkpoint, "--max-new-tokens", "2"]
    assert main(arguments) == 2
    assert "max_aspect_ratio of at most 20, not 30" in capsys.readouterr().err
    assert main([*arguments, "--image-limit", "max_aspect_ratio=40"]) == 0
    assert main([*arguments, "--image-limit", "aspect_ratio=40"]) == 2
    assert "expected NAME=NUMBER with one of max_bytes" in capsys.readouterr().err


def test_sampling_repeats_with_its_seed(checkpoint, picture, capsys):
    arguments = [picture, "What?", "--model", checkpoint, "--temperature", "5"]
    assert ask(*arguments, "--seed", "3", capsys=capsys) == ask(*arguments, "--seed", "3", capsys=capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["PICTURE", "PICTURE", "Same?", "--model", "MODEL", "--seed", "1"],
        ["--model", "MODEL", "--seed", "1", "PICTURE", "PICTURE", "Same?"],
        ["PICTURE", "--model", "MODEL", "PICTURE", "--seed", "1", "Same?"],
        ["PICTURE", "--model=MODEL", "--seed", "1", "PICTURE", "--", "Same?"],
    ],
)
def test_options_may_stand_between_pictures_and_question(arguments, checkpoint, picture, capsys):
    names = {"PICTURE": picture, "MODEL": checkpoint, "--model=MODEL": f"--model={checkpoint}"}
    arguments = [names.get(argument, argument) for argument in arguments]
    assert main(["ask", "--max-new-tokens", "2", "--json", *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["images"], record["question"], record["seed"]) == ([picture, picture], "Same?", 1)


def test_settings_of_a_recipe_may_stand_between_options(capsys):
    for arguments in (["--preview", "missing.yaml", "a=1"], ["missing.yaml", "a=1", "--preview", "b=2"]):
        assert main(["train", *arguments]) == 2
        assert "got 'missing.yaml'" in capsys.readouterr().err


def test_a_refused_picture_is_named_with_the_option_that_allows_it(checkpoint, picture, tmp_path, capsys):
    panorama = tmp_path / "a panorama.png"
    PIL.Image.new("RGB", (900, 30), "red").save(panorama)
    uri = "data:image/png;base64," + base64.b64encode(panorama.read_bytes()).decode()
    for source, name in ((str(panorama), "the file is 'a panorama.png'"), (uri, "")):
        assert main(["ask", picture, source, picture, "What?", "--model", checkpoint]) == 2
        error = capsys.readouterr().err
        assert "picture 2 of 3: got an image of 900 x 30" in error and name in error and "ImageLimits" not in error
        advice = re.search(r"--image-limit (\w+)=NUMBER", error)[1]
        ask(source, "What?", "--model", checkpoint, "--image-limit", f"{advice}=1000", capsys=capsys)


def write_other_kinds(folder: Path) -> dict[str, str]:
    """One file of each kind that this package leaves to others, by the package that reads it."""
    picture = PIL.Image.new("RGB", (64, 48), "red")
    picture.save(folder / "a picture.avif")
    picture.save(folder / "b.tif")
    picture.convert("CMYK").save(folder / "c.tiff")
    PIL.Image.new("I;16", (64, 48), 30000).save(folder / "d.tif")
    picture.save(folder / "e.pdf")
    (folder / "f.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="4" height="3"/>')
    (folder / "g.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    pillow = dict.fromkeys(["a picture.avif", "b.tif", "c.tiff", "d.tif"], "from PIL.Image import open")
    return pillow | {
        "e.pdf": "pip install pypdfium2",
        "f.svg": "pip install resvg_py",
        "g.heic": "install pillow-heif",
    }


def test_other_kinds_of_picture_come_with_a_command_that_converts_them(checkpoint, tmp_path, capsys):
    for name, expected in write_other_kinds(tmp_path).items():
        path = tmp_path / name
        assert main(["ask", str(path), "What?", "--model", checkpoint]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{name}: got " in error and expected in error
        if "PIL.Image" in error:
            command = error.partition("convert it: ")[2]
            subprocess.run(["sh", "-c", command], check=True)
            colour = load_image(Path(f"{path}.png")).getpixel((5, 5))
            assert colour == (117, 117, 117) if name == "d.tif" else colour[0] > 250


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["only a question"], "expected pictures and a question"),
        (["missing.png", "What?"], "missing.png"),
        ([__file__, "What?"], "got"),
        (["https://example.com/cat.png", "What?"], "URL"),
        (["/dev/null", "What?"], "no regular file"),
        (["x" * 5000, "What?"], "xxx"),
        (["PICTURE", "What?", "--model", "no/such-model"], "got model 'no/such-model'"),
        (["PICTURE", "What?", "--template", "no_such"], "conversation format 'no_such'"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(arguments, message, picture, capsys):
    code = main(["ask", *[picture if argument == "PICTURE" else argument for argument in arguments]])
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.startswith("llava: ") and captured.err.count("\n") == 1


class Chat:
    """`llava chat` in a process of its own, as somebody who types sees it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "modeling_llava.cli", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.read_until("\n> ")

    def read_until(self, end: str) -> str:
        text = ""
        while not text.endswith(end):
            character = self.process.stdout.read(1)
            assert character, (text, self.process.stderr.read())
            text += character
        return text

    def type(self, line: str) -> str:
        """What is printed before the next prompt."""
        self.send(line)
        return self.read_until("> ")

    def send(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def interrupt(self, *, at_prompt: bool = False) -> str:
        if at_prompt:
            # Python sees a signal between the prompt and the wait for a line with that line only.
            time.sleep(0.3)
        self.process.send_signal(signal.SIGINT)
        return self.read_until("\n> ")


@pytest.fixture
def start_chat():
    chats = []
    yield lambda *arguments: chats.append(Chat(*arguments)) or chats[-1]
    for chat in chats:
        with chat.process:
            chat.process.kill()


def test_chat_in_a_process_of_its_own(checkpoint, picture, tmp_path, start_chat):
    shutil.copy(picture, tmp_path / "it is red.png")
    saved = tmp_path / "my talk.json"
    chat = start_chat("--model", checkpoint, "--max-new-tokens", "4")
    for name in (f'"{tmp_path}/it is red.png"', f"{tmp_path}/it is red.png", f"{picture} '{picture}'"):
        assert chat.type(f"/image {name}") == "> "
    for name in ("missing.png", "'open.png", ""):
        assert "got " in chat.type(f"/image {name}")
    chat.type("What is this?")
    chat.type("And now?")
    assert chat.type(f'/save "{saved}"') == "> "
    assert "got 2 names" in chat.type("/save my talk")
    chat.type("/reset")
    chat.type(f"/save '{saved}.2'")
    turns = json.loads(saved.read_text())
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [turn["images"] for turn in turns] == [4, 0, 0, 0]
    assert json.loads((tmp_path / "my talk.json.2").read_text()) == []
    chat.process.stdin.close()
    assert chat.process.wait() == 0


@pytest.mark.parametrize("word", ["exit", "quit", "/quit", "/exit", " Exit "])
def test_words_that_end_a_chat(word, monkeypatch, capsys):
    monkeypatch.setattr(answering, "_start_session", lambda options, limits: None)
    monkeypatch.setattr("builtins.input", lambda prompt: word)
    assert main(["chat"]) == 0


def test_ctrl_c_stops_an_answer_and_clears_a_line(checkpoint, picture, tmp_path, start_chat):
    chat = start_chat("--model", checkpoint, "--max-new-tokens", "100000", "--temperature", "50")
    assert chat.interrupt(at_prompt=True) == "\n> "
    chat.type(f"/image {picture}")
    chat.send("Tell me everything.")
    chat.process.stdout.read(20)
    assert "(stopped: " in chat.interrupt()
    saved = tmp_path / "talk.json"
    chat.type(f"/save {saved}")
    assert json.loads(saved.read_text()) == []
    chat.send("exit")
    assert chat.process.wait() == 0


def test_names_may_begin_with_the_home_folder(checkpoint, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(Path(picture).parent))
    ask("~/red.png", "What?", "--model", checkpoint, capsys=capsys)


def test_doctor_reports_versions_and_what_a_model_needs(capsys):
    assert main(["doctor", "--parameters", "7e9"]) == 0
    report = capsys.readouterr().out
    assert "torch" in report and "bfloat16: 13.0 GiB" in report


def test_assemble_makes_a_llava_that_answers(picture, tmp_path, capsys):
    from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil

    tower, text = tmp_path / "tower", tmp_path / "text"
    AutoModel.from_config(VISION_CONFIGS["clip"]()).save_pretrained(tower)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tower)
    assert AutoImageProcessor.from_pretrained(tower)
    AutoModelForCausalLM.from_config(TEXT_CONFIGS["phi"]()).save_pretrained(text)
    tiny_tokenizer().save_pretrained(text)
    out = str(tmp_path / "llava")
    arguments = ["assemble", "--vision-tower", str(tower), "--language-model", str(text), "--out", out]
    assert main([*arguments, "--projector", "mlp3x_gelu", "--template", "vicuna_v1"]) == 0
    capsys.readouterr()
    ask(picture, "What is this?", "--model", out, capsys=capsys)
    assert main([*arguments, "--projector", "mlp", "--template", "vicuna_v1"]) == 2
    capsys.readouterr()
    tiles = ["--image-aspect-ratio", "anyres", "--image-grid-pinpoints", "28x56", "56x28", "--template", "vicuna_v1"]
    tiled = [*arguments, *tiles, "--patch-merge-type", "spatial_unpad", "--vision-feature-layer", "-2", "-1"]
    assert main(tiled) == 0
    config = json.loads(Path(out, "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[28, 56], [56, 28]]
    assert (config["patch_merge_type"], config["vision_feature_layer"]) == ("spatial_unpad", [-2, -1])
    capsys.readouterr()
    ask(picture, "What is this?", "--model", out, capsys=capsys)
    assert main([*arguments, "--template", "vicuna_v1", "--language-model", "no/such-model"]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("llava: got language_model 'no/such-model'; expected a folder or a Hub id")


def write_data(folder: Path, *answers: str) -> str:
    PIL.Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    records = []
    for number, answer in enumerate(answers):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"row{number}", "image": "red.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


def test_check_data_in_a_process_of_its_own(checkpoint, tmp_path):
    data = write_data(tmp_path, "A circle.", "", "Red.")
    command = [sys.executable, "-m", "modeling_llava.cli", "check-data", data, "--image-folder", str(tmp_path)]
    command += ["--model", checkpoint, "--show", "1", "--json", str(tmp_path / "report.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "<< A circle.</s>>>" in result.stdout
    assert result.stdout.rstrip().split("\n")[-2] == "  empty answer        1: row1"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["usable_rows"], [entry["id"] for entry in report["refused"]]) == (2, ["row1"])


def test_check_data_of_usable_records_by_the_embedded_model(tmp_path, capsys):
    data = write_data(tmp_path, "A circle.", "Red.")
    page = tmp_path / "page.html"
    arguments = ["check-data", data, "--image-folder", str(tmp_path), "--template", "vicuna_v1", "--html", str(page)]
    assert main([*arguments, "--color", "--headers-only"]) == 0
    assert "refused               0" in capsys.readouterr().out
    assert page.read_text().count("<section>") == 2


def test_check_data_follows_links_where_it_may(checkpoint, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    data = write_data(tmp_path, "A circle.")
    (tmp_path / "red.png").rename(tmp_path / "elsewhere" / "red.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").symlink_to(tmp_path / "elsewhere" / "red.png")
    arguments = ["check-data", data, "--image-folder", str(tmp_path / "images"), "--model", checkpoint]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "image outside its folder 1: row0" in printed and "--follow-links" in printed
    assert main([*arguments, "--follow-links"]) == 0


def test_check_data_refuses_pictures_above_a_limit(checkpoint, tmp_path, capsys):
    data = write_data(tmp_path, "A circle.")
    arguments = ["check-data", data, "--image-folder", str(tmp_path), "--model", checkpoint]
    assert main([*arguments, "--image-limit", "max_pixels=10", "--image-limit", "max_aspect_ratio=1.5"]) == 1
    assert ": row0" in capsys.readouterr().out
    PIL.Image.new("RGB", (900, 30), "red").save(tmp_path / "red.png")
    assert main(arguments) == 1
    page = tmp_path / "page.html"
    assert main([*arguments, "--image-limit", "max_aspect_ratio=40", "--html", str(page)]) == 0
    assert "[image 900x30: " in page.read_text()


def test_check_data_drops_keeps_and_splits_long_rows(checkpoint, tmp_path, capsys):
    data = write_data(tmp_path, "A circle." * 40)
    arguments = ["check-data", data, "--image-folder", str(tmp_path), "--model", checkpoint, "--max-length", "200"]
    assert main(arguments) == 1
    assert "too long            1: row0" in capsys.readouterr().out
    assert main([*arguments, "--too-long", "keep"]) == 0
    assert "too long, kept      1" in capsys.readouterr().out
    assert main([*arguments, "--too-long", "split"]) == 1
    assert "question and answer too long 1: row0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.json"], "missing.json"),
        (["no/such-dataset"], "got the data 'no/such-dataset'"),
        (["DATA", "--model", "no/such-model"], "got model 'no/such-model'"),
        (["DATA", "--template", "no_such"], "conversation format 'no_such'"),
        (["DATA", "--too-long", "cut"], "expected one of keep, drop, split"),
        (["DATA", "--max-length", "0"], "max_length=0"),
        (["DATA", "--image-limit", "max_pixels=0"], "got max_pixels=0"),
        (["DATA", "--image-limit", "max_pixels=many"], "got 'max_pixels=many'; expected NAME=NUMBER"),
        (["DATA", "--image-limit", "pixels=5"], "got 'pixels=5'; expected NAME=NUMBER with one of max_bytes"),
        (["DATA", "--workers", "0"], "got 0 workers"),
        (["DATA", "--json", "DATA"], "as data and as the file to write"),
        (["DATA", "--html", "DATA"], "as data and as the file to write"),
        (["DATA", "--show", "-1"], "got --show -1"),
        (["EMPTY"], "got no records"),
        (["TABLE"], "expected a file that ends in .json, .jsonl, .parquet, .arrow"),
        (["BROKEN"], "no JSON after 1 records"),
        (["DATA", "--json", "/"], "Is a directory"),
        (["DATA", "--html", "/missing/page.html"], "/missing/page.html"),
    ],
)
def test_mistakes_of_check_data_end_in_one_line_and_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "broken.json").write_text('[{"id": 1},')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "table.csv").write_text("image,question,answer")
    paths = {"DATA": write_data(tmp_path, "A"), "BROKEN": str(tmp_path / "broken.json")}
    paths |= {"EMPTY": str(tmp_path / "empty.json"), "TABLE": str(tmp_path / "table.csv")}
    arguments = [paths.get(argument, argument) for argument in arguments]
    assert main(["check-data", *arguments, "--image-folder", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("llava: ") and captured.err.count("\n") == 1


def test_training_from_the_command_line_refuses_a_missing_recipe(capsys):
    assert main(["train", "missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_a_missing_extra_is_named_with_its_pip_command(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: align\nmodel: a\noutput_dir: b\ndata: [{path: c}]")
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "modeling_llava.training.run", raising=False)
    monkeypatch.delitem(sys.modules, "modeling_llava.training.trainer", raising=False)
    assert main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err == (
        "llava: trl is not installed; this command needs it: pip install 'anyllava[train]'\n"
    )


@pytest.mark.parametrize(
    "error, message",
    [
        (
            ModuleNotFoundError("No module", name="bitsandbytes.nn"),
            "bitsandbytes is not installed; .*: pip install bi",
        ),
        (
            ImportError("peft is needed to read a LoRA folder; pip install peft"),
            "peft is needed to read a LoRA folder",
        ),
        (TemplateError("No system role"), "No system role"),
    ],
)
def test_what_is_missing_and_what_a_template_refuses_are_one_line(error, message, capsys, monkeypatch):
    def fail(options) -> None:
        raise error

    monkeypatch.setattr(doctor, "run_doctor", fail)
    assert main(["doctor"]) == 2
    assert re.match(f"llava: {message}.*\n$", capsys.readouterr().err)


def test_weights_that_break_off_are_one_line(checkpoint, picture, tmp_path, capsys):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-1000])
    assert main(["ask", picture, "What?", "--model", str(broken)]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("llava: got ") and "is damaged" in printed and "expected a whole file" in printed
