"""Rows of every kind of source, alone and mixed, and what becomes of long ones."""

import json
from pathlib import Path

import datasets
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset, List
from torch.utils.data import DataLoader

from processing_llava.data.collator import LlavaDataCollator
from processing_llava.data.data_sources import DataSource, open_records
from processing_llava.data.row_datasets import load_rows
from tests.tiny import tiny_processor

IMAGE_ITEM = {"type": "image", "text": None}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """With two pictures; `datasets` keeps its cache beside them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for name in ("1.png", "2.png"):
        PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    return tmp_path


def write_json(path, num_records: int = 4, *, prefix: str = "j") -> str:
    """LLaVA JSON as it is found: mixed types of ids; no image, one, two."""
    records = []
    for number in range(num_records):
        images = [f"{1 + index % 2}.png" for index in range(number % 3)]
        record = {"id": number if number == 0 else f"{prefix}{number}"}
        if images:
            record["image"] = images[0] if len(images) == 1 else images
        questions = ["<image>\n" * len(images) + "What?"] + ["Sure?"] * (2 if images else 1)
        exchanges = [
            ({"from": "human", "value": question}, {"from": "gpt", "value": "A bus."}) for question in questions
        ]
        records.append(record | {"conversations": [turn for exchange in exchanges for turn in exchange]})
    path.write_text(json.dumps(records) if path.suffix == ".json" else "\n".join(map(json.dumps, records)))
    return str(path)


def image_dataset(num_rows: int = 3) -> Dataset:
    """As on the Hub: encoded pictures, items with the keys of all others."""
    content = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]
    answer = [{"type": "text", "text": "A bus.", "index": None}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    pictures = [PIL.Image.new("RGB", (40 + number, 30), "blue") for number in range(num_rows)]
    rows = [{"id": f"d{number}", "images": [picture], "messages": messages} for number, picture in enumerate(pictures)]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def save_as(kind: str, folder) -> str:
    dataset, path = image_dataset(), folder / "data"
    if kind == "save_to_disk":
        dataset.save_to_disk(path)
    elif kind == "splits on disk":
        DatasetDict({"test": image_dataset(1), "train": dataset}).save_to_disk(path)
    elif kind == "parquet":
        dataset.to_parquet(path.with_suffix(".parquet"))
        return str(path.with_suffix(".parquet"))
    elif kind == "arrow":
        dataset.save_to_disk(path)
        return str(next(path.glob("*.arrow")))
    else:
        path.mkdir()
        dataset.to_parquet(path / "part-0.parquet")
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["save_to_disk", "splits on disk", "parquet", "arrow", "folder of parquet"])
def test_datasets_on_disk(folder, kind, streaming):
    source = DataSource(path=save_as(kind, folder), streaming=streaming)
    total, records = open_records(source)
    assert total == (None if streaming else 3)
    assert isinstance(next(records)["images"][0]["bytes"], bytes)
    rows, _ = load_rows([source])
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    rows = list(rows)
    assert [row["id"] for row in rows] == ["d0", "d1", "d2"]
    assert rows[0]["images"][0].startswith(b"\x89PNG")
    first = rows[0]["messages"][0]
    assert [item["type"] for item in first["content"]] == ["image", "text"]
    assert "A bus." in tiny_processor().render(rows[0]["messages"])


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_inside_of_items_stay_encoded(folder, streaming):
    item = {"type": "image", "text": None, "image": PIL.Image.new("RGB", (40, 30))}
    messages = [{"role": "user", "content": [item]}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    features = datasets.Features(
        {
            "messages": List(
                {
                    "role": datasets.Value("string"),
                    "content": List(
                        {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": Image()}
                    ),
                }
            )
        }
    )
    Dataset.from_list([{"messages": messages}], features=features).to_parquet(folder / "nested.parquet")
    source = DataSource(path=str(folder / "nested.parquet"), streaming=streaming)
    record = next(open_records(source)[1])
    assert record["messages"][0]["content"][0]["image"]["bytes"].startswith(b"\x89PNG")
    assert list(load_rows([source])[0])[0]["images"][0].startswith(b"\x89PNG")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "folder/data.jsonl"])
def test_json_files_and_folders_of_them(folder, name, streaming):
    (folder / "folder").mkdir()
    path = write_json(folder / name)
    source = DataSource(path=path if name[:6] != "folder" else str(folder / "folder"), image_folder=str(folder))
    rows, fates = load_rows([DataSource(**{**vars(source), "streaming": streaming})])
    rows = list(rows)
    assert [row["id"] for row in rows] == ["0", "j1", "j2", "j3"]
    assert [row["images"] for row in rows] == [[], [folder / "1.png"], [folder / "1.png", folder / "2.png"], []]
    assert not fates


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_folder_may_differ_in_types(folder, streaming):
    data = folder / "llava"
    data.mkdir()
    exchange = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]
    picture = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A bus."}]
    pictures = [{"from": "human", "value": "<image><image>What?"}, {"from": "gpt", "value": "A bus."}]
    files = {
        "train-0.json": [{"id": 1, "image": "1.png", "conversations": picture}],
        "train-1.json": [
            {"id": "x", "image": ["1.png", "2.png"], "conversations": pictures},
            {"conversations": exchange},
        ],
        "test.json": [{"id": "held out", "conversations": exchange}],
    }
    for name, records in files.items():
        (data / name).write_text(json.dumps(records))
    source = DataSource(path=str(data), image_folder=str(folder), streaming=streaming)
    rows = list(load_rows([source])[0])
    assert [(row["id"], len(row["images"])) for row in rows] == [("1", 1), ("x", 2), ("2", 0)]
    assert open_records(source)[0] == 3


def save_numbered(kind: str, folder) -> str:
    """A hundred rows without pictures as a "train", of which every kind of source can be made."""
    exchange = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bus."}]
    records = [{"id": f"n{number}", "messages": exchange} for number in range(100)]
    path = folder / "numbered"
    if kind in (".json", ".jsonl"):
        path = path.with_suffix(kind)
        path.write_text(json.dumps(records) if kind == ".json" else "\n".join(map(json.dumps, records)))
    elif kind.startswith("folder of json"):
        path.mkdir()
        for part in range(4):
            lines = map(json.dumps, records[part * 25 : part * 25 + 25])
            (path / f"train-{part}.{kind[10:]}").write_text(
                "\n".join(lines) if kind.endswith("l") else "[" + ",".join(lines) + "]"
            )
    elif kind == "Dataset":
        Dataset.from_list(records).save_to_disk(path)
    elif kind == "Dataset with a name":
        Dataset.from_list(records, split="train").save_to_disk(path)
    elif kind == "DatasetDict":
        DatasetDict({"train": Dataset.from_list(records)}).save_to_disk(path)
    elif kind == ".arrow":
        Dataset.from_list(records).save_to_disk(path)
        path = next(path.glob("*.arrow"))
    else:
        path.mkdir()
        Dataset.from_list(records).to_parquet(path / "part-0.parquet")
        path = path / "part-0.parquet" if kind == ".parquet" else path
    return str(path)


JSON_KINDS = [".json", ".jsonl", "folder of json", "folder of jsonl"]
SAVED_KINDS = ["Dataset", "Dataset with a name", "DatasetDict"]
FOLDERS = ["folder of json", "folder of jsonl", "folder of parquet"]
KINDS = [*JSON_KINDS, *SAVED_KINDS, ".parquet", ".arrow", "folder of parquet"]
SPLITS = {
    "train": range(100),
    "train[:75%]": range(75),
    "train[75%:]": range(75, 100),
    "train[-3:]": range(97, 100),
    "train[2:5]": range(2, 5),
    "train[:2]+train[99:]": [0, 1, 99],
    "train[98:]+train[:1]": [98, 99, 0],
}


WRONG_SPLITS = ["validation", "validation[:50%]", "train[", "train[:x]", "train[100:]", "train[:0]", "train[5:2]"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_an_effect_or_is_refused(folder, kind, streaming):
    """For every kind of source, at both doors: what is trained on, and what is checked."""
    path = save_numbered(kind, folder)

    def read(**fields) -> list[list[str]]:
        source = DataSource(path=path, streaming=streaming, **fields)
        trained = [row["id"] for row in load_rows([source])[0]]
        total, records = open_records(source)
        checked = [record["id"] for record in records]
        assert total in (None, len(checked))
        return [trained, checked]

    for split, numbers in SPLITS.items():
        ids = [f"n{number}" for number in numbers]
        if split != "train" and streaming and kind in (".parquet", ".arrow", "folder of parquet"):
            with pytest.raises(ValueError, match="with streaming: true; expected a whole split"):
                read(split=split)
        else:
            assert read(split=split) == [ids, ids], split
    for split in WRONG_SPLITS:
        with pytest.raises(ValueError, match="got (the data|no row|no records|split)"):
            read(split=split)
    with pytest.raises(ValueError, match="no_such"):
        read(name="no_such")
    with pytest.raises(FileNotFoundError, match="got the image_folder 'nowhere' for .*; expected a folder"):
        read(image_folder="nowhere")
    assert read(image_folder=str(folder), follow_links=True) == read()
    for change, message in (({"split": ""}, "got split=''"), ({"split": None}, "got split=None")):
        with pytest.raises(ValueError, match=message):
            read(**change)
    if Path(path).is_dir():
        assert read(follow_links=True) == read()
        return
    with pytest.raises(ValueError, match="got follow_links for .* without an image_folder"):
        read(follow_links=True)


def test_a_saved_dataset_has_its_own_name_too(folder):
    exchange = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    dataset = Dataset.from_list([{"messages": exchange}])
    for split in (None, "test"):
        Dataset(dataset.data, split=split).save_to_disk(folder / str(split))
    assert len(load_rows([DataSource(path=str(folder / "test"), split="test")])[0]) == 1
    assert len(load_rows([DataSource(path=str(folder / "test"))])[0]) == 1
    with pytest.raises(ValueError, match="split 'test'"):
        load_rows([DataSource(path=str(folder / "None"), split="test")])


def test_more_rows_than_a_chunk_and_none(folder):
    rows, _ = load_rows([DataSource(path=write_json(folder / "data.jsonl", 2500), image_folder=str(folder))])
    assert (len(rows), rows[2001]["id"]) == (2500, "j2001")
    assert rows["id"][2001] == "j2001"
    (folder / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="got no records in .*empty.json"):
        load_rows([DataSource(path=str(folder / "empty.json"))])


def test_sources_without_weights_follow_each_other(folder):
    options = {"image_folder": str(folder)}
    sources = [DataSource(path=write_json(folder / f"{name}.json", 2, prefix=name), **options) for name in "ab"]
    assert [row["id"] for row in load_rows(sources)[0]] == ["0", "a1", "0", "b1"]


def test_streaming_rows_are_sampled_from_a_buffer(folder):
    source = {"path": write_json(folder / "a.json", 90), "image_folder": str(folder), "streaming": True}
    in_order, sampled, again, other = (
        [row["id"] for row in load_rows([DataSource(**source, shuffle_buffer=buffer)], seed=seed)[0]]
        for buffer, seed in ((None, 0), (30, 0), (30, 0), (30, 1))
    )
    assert sorted(sampled) == sorted(in_order) and len(set(sampled)) == 90
    assert sampled == again and len({tuple(order) for order in (in_order, sampled, other)}) == 3
    assert max(in_order.index(row) - place for place, row in enumerate(sampled)) <= 30
    with pytest.raises(ValueError, match="streaming: true"):
        DataSource(path="a.json", shuffle_buffer=30)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_follows_weights_and_seed(folder, streaming):
    options = {"image_folder": str(folder)}
    sources = [
        DataSource(path=write_json(folder / "a.json", 90, prefix="a"), weight=3, streaming=streaming, **options),
        DataSource(path=save_as("parquet", folder), weight=1, **options),
    ]

    def ids(seed: int) -> list[str]:
        return [row["id"] for row in load_rows(sources, seed=seed)[0]]

    sampled = ids(1)
    assert sampled == ids(1) != ids(2)
    assert len({*sampled}) == 93
    share = sum(row_id.startswith("d") for row_id in sampled) / len(sampled)
    assert 0.15 < share < 0.35


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("too_long", "ids", "fates"),
    [
        ("keep", ["0", "j1", "j2", "j3"], {"fits": 2, "too long, kept": 2}),
        ("drop", ["0", "j3"], {"fits": 2, "too long, dropped": 2}),
        ("split", ["0", "j1#1", "j1#2", "j2#1", "j2#2", "j2#3", "j3"], {"fits": 2, "part of one too long": 5}),
    ],
)
def test_long_rows_and_their_counts(folder, too_long, ids, fates, streaming):
    processor = tiny_processor()
    source = DataSource(path=write_json(folder / "data.json"), image_folder=str(folder), streaming=streaming)
    limits = {"processor": processor, "max_length": 212, "too_long": too_long}
    rows, counted = load_rows([source], **limits)
    rows = list(rows)
    assert [row["id"] for row in rows] == ids
    assert set(rows[0]) == {"id", "images", "messages"}
    # Those of a stream are counted as it is read.
    assert counted == fates


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("max_length", [None, 190])
def test_first_turns_that_are_left_out_are_counted_once(folder, max_length, streaming):
    exchange = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]
    records = [
        {"conversations": [{"from": "gpt", "value": "Hello."}, *exchange * 4]},
        {"conversations": exchange},
        {"conversations": [{"from": "gpt", "value": "Hello."}, *exchange]},
    ]
    (folder / "data.json").write_text(json.dumps(records))
    source = DataSource(path=str(folder / "data.json"), streaming=streaming)
    processor = None if max_length is None else tiny_processor()
    rows, counted = load_rows([source], processor=processor, max_length=max_length, too_long="split")
    assert (len(list(rows)) > 3) == (max_length is not None)
    assert counted["first turn of the assistant left out"] == 2


# from Python 3.12 on, forking a process with threads warns
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader_count_together(folder):
    source = DataSource(path=write_json(folder / "data.json"), image_folder=str(folder), streaming=True)
    rows, counted = load_rows([source, source], processor=tiny_processor(), max_length=212)
    for loader in (rows, DataLoader(rows, batch_size=None, num_workers=1)):
        counted.clear()
        assert not counted
        assert len(list(loader)) == 4
        assert counted == {"fits": 4, "too long, dropped": 4}


@pytest.mark.parametrize("max_length", [None, 300])
def test_lengths_are_those_of_the_batches(folder, max_length):
    processor = tiny_processor()
    source = DataSource(path=write_json(folder / "data.json"), image_folder=str(folder))
    rows, _ = load_rows([source], processor=processor, max_length=max_length)
    counts = rows.with_format(None)
    expected = [LlavaDataCollator(processor)([row])["input_ids"].shape[1] for row in rows]
    assert counts["num_tokens"][:] == expected
    assert counts["num_images"][:] == [len(row["images"]) for row in rows] == [0, 1, 2, 0]


# from Python 3.12 on, forking a process with threads warns
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_count_what_one_counts(folder):
    source = DataSource(path=write_json(folder / "data.json"), image_folder=str(folder))
    limits = {"processor": tiny_processor(), "max_length": 212, "too_long": "split"}
    rows, counted = load_rows([source], num_proc=2, **limits)
    alone, counted_alone = load_rows([source], **limits)
    assert (list(rows), counted) == (list(alone), counted_alone)


def test_mistakes_in_rows_to_count_name_the_record(folder):
    path = write_json(folder / "data.json")
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match="cannot be opened .*in record 'j1'"):
        load_rows([DataSource(path=path, image_folder=str(folder))], processor=tiny_processor(), max_length=999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "missing.json"}, "missing.json"),
        ({"path": "no/such-dataset"}, "got the data 'no/such-dataset'"),
        ({"split": "test"}, "split 'test'"),
        ({"name": "no_such"}, "no_such"),
    ],
)
def test_sources_that_are_not_there_are_named(folder, change, message):
    source = DataSource(**{"path": save_as("folder of parquet", folder), **change})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_rows([source])


@pytest.mark.parametrize("kind", ["save_to_disk", "parquet"])
def test_damaged_files_are_named(folder, kind):
    path = save_as(kind, folder)
    for file in [folder / "data.parquet"] if kind == "parquet" else (folder / "data").glob("*.arrow"):
        file.write_bytes(b"damage")
    with pytest.raises(ValueError, match="got the data") as caught:
        list(open_records(DataSource(path=path))[1])
    assert "while generating" not in str(caught.value)


def test_mistakes_in_mixtures(folder):
    path = write_json(folder / "data.json")
    with pytest.raises(ValueError, match="weight=0 "):
        DataSource(path=path, weight=0)
    with pytest.raises(ValueError, match="got 1 weights for 2 sources"):
        load_rows([DataSource(path=path, weight=1), DataSource(path=path)])
    with pytest.raises(ValueError, match="got too_long='cut'"):
        load_rows([DataSource(path=path)], too_long="cut")


def test_a_record_that_cannot_be_used_stops_the_loading(folder):
    dataset = image_dataset()
    dataset = dataset.add_column("wrong", [0, 0, 0]).rename_column("messages", "talk")
    dataset.to_parquet(folder / "wrong.parquet")
    with pytest.raises(ValueError, match="in record 'd0'; expected 'conversations' or 'messages'"):
        load_rows([DataSource(path=str(folder / "wrong.parquet"))])
