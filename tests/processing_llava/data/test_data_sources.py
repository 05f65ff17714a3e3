"""Names that lead to files of the image folder, and to no other."""

import json
import os

import pytest
from PIL import ExifTags, Image

from modeling_llava.export.dataset_repository import write_parquet
from processing_llava.data.data_check import RecordCheck, check_sources
from processing_llava.data.data_sources import DataSource, ImageFolder
from processing_llava.data.row_datasets import load_rows
from tests.tiny import tiny_processor


@pytest.fixture
def folder(tmp_path):
    """`images` with a picture, links and a pipe in it, beside another folder whose name begins alike."""
    images, others = tmp_path / "images", tmp_path / "images-private"
    (images / "deep").mkdir(parents=True)
    others.mkdir()
    Image.new("RGB", (4, 4), "red").save(images / "deep" / "a.png")
    Image.new("RGB", (4, 4), "blue").save(others / "b.png")
    (images / "inside.png").symlink_to("deep/a.png")
    (images / "outside.png").symlink_to(others / "b.png")
    (images / "others").symlink_to(others)
    (images / "loop").symlink_to("loop")
    os.mkfifo(images / "pipe")
    return images


@pytest.mark.parametrize("name", ["deep/a.png", "deep/../deep/./a.png", "inside.png", "missing.png"])
def test_names_inside(folder, name):
    found = ImageFolder(folder).find(name)
    assert found.is_relative_to(folder) and found == (folder / name).resolve()
    assert ImageFolder(folder).find(str(folder / name)) == found


@pytest.mark.parametrize(
    "name",
    [
        *("../images-private/b.png", "deep/../../x", "..", "/etc/hostname", "/", "//etc/hostname", "/dev/zero"),
        *("outside.png", "others/b.png", "others/../images-private/b.png", "\0"),
    ],
)
def test_names_that_lead_out_are_refused(folder, name):
    with pytest.raises(ValueError, match=r"got the image path .*; expected a file"):
        ImageFolder(folder).find(name)


def test_links_may_be_followed_but_nothing_else(folder):
    following = ImageFolder(folder, follow_links=True)
    for name in ("outside.png", "others/b.png"):
        assert following.find(name).read_bytes().startswith(b"\x89PNG")
    for name in ("../images-private/b.png", "/etc/hostname", "deep/../../x"):
        with pytest.raises(ValueError, match="which leads to"):
            following.find(name)


def test_a_folder_may_itself_be_reached_by_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert ImageFolder(tmp_path / "link").find("deep/a.png") == folder / "deep" / "a.png"


def write_rows(folder, names):
    turns = [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": name, "image": name, "conversations": turns} for name in names]
    path = folder.parent / "rows.json"
    path.write_text(json.dumps(records))
    return str(path)


def test_a_data_set_is_reported_record_by_record(folder):
    names = ["deep/a.png", "inside.png", "outside.png", "../images-private/b.png", "pipe", "loop", "/dev/zero"]
    source = DataSource(path=write_rows(folder, names), image_folder=str(folder))
    report = check_sources([source], RecordCheck(tiny_processor()), workers=1)
    reasons = {refusal.id: refusal.reason for refusal in report.refusals}
    elsewhere = dict.fromkeys(("outside.png", "../images-private/b.png", "/dev/zero"), "image outside its folder")
    assert reasons == elsewhere | {"pipe": "unreadable image", "loop": "unreadable image"}
    linked = DataSource(path=source.path, image_folder=str(folder), follow_links=True)
    report = check_sources([linked], RecordCheck(tiny_processor()), workers=1)
    assert "outside.png" not in {refusal.id for refusal in report.refusals}


@pytest.mark.parametrize("scheme", ["file", "https", "S3"])
def test_addresses_are_refused_as_they_would_be_opened_without_the_folder(folder, scheme):
    outside = folder.parent / "images-private" / "b.png"
    path = write_rows(folder, [f"{scheme}://..{outside}"])
    with pytest.raises(ValueError, match="got the image address .*; expected a path or bytes; download it"):
        load_rows([DataSource(path=path, image_folder=str(folder))])


def test_what_is_uploaded_went_through_the_door(folder, tmp_path):
    """It is a picture, without its metadata."""
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody"
    Image.new("RGB", (4, 4), "red").save(folder / "deep" / "b.png", exif=exif)
    source = DataSource(path=write_rows(folder, ["deep/b.png"]), image_folder=str(folder))
    assert write_parquet(source, tmp_path / "out") == {"rows": 1, "images": 1}
    (shard,) = (tmp_path / "out").iterdir()
    data = shard.read_bytes()
    assert b"\x89PNG" in data and b"somebody" not in data
    (folder / "deep" / "b.png").write_text("a secret")
    with pytest.raises(ValueError, match="no image of a known format .* record 'deep/b.png'"):
        write_parquet(source, tmp_path / "again")


def test_rows_to_train_on_hold_paths_inside(folder):
    rows, _ = load_rows([DataSource(path=write_rows(folder, ["inside.png"]), image_folder=str(folder))])
    assert list(rows)[0]["images"] == [folder / "deep" / "a.png"]
    with pytest.raises(ValueError, match="in record 'outside.png'"):
        load_rows([DataSource(path=write_rows(folder, ["outside.png"]), image_folder=str(folder))])
