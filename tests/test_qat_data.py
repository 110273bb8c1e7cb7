"""Datasets for qat: what kinds there are, what their loss is over, and what is said of wrong ones."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hub_server import Hub

pytest.importorskip("trl")

from fp4conv.errors import Fp4convError
from fp4conv.qat.data import IGNORED, Data, held_out, load_data
from fp4conv.qat.hub_data import pin_dataset
from fp4conv.qat.made import Task, tokenizer_for, write_task
from fp4conv.qat.settings import Settings, settings_from

WORDS = ["user", "assistant", ":", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TOKENIZER = tokenizer_for(WORDS)
IDS = TOKENIZER.get_vocab()
HELD_OUT = [10, 14, 16, 18]  # of twenty rows, a fifth


def write(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, **options: object) -> Data:
    return load_data(settings_from({"dataset": str(path), "max_length": 32, **options}), TOKENIZER)


def ids(text: str) -> tuple[int, ...]:
    return tuple(IDS[word] for word in text.split())


def test_of_prompt_and_completion_the_loss_is_over_the_completion(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[{"prompt": "a b", "completion": " c d"}] * 4)
    data = load(path)
    example = data.train[0]
    assert example.ids == ids("<s> a b c d </s>")
    assert example.labels == [IGNORED] * 3 + list(ids("c d </s>"))
    assert (data.kind, example.answered, data.has_answers) == ("prompt/completion", True, True)


def test_of_text_the_loss_is_over_all(tmp_path: Path) -> None:
    data = load(write(tmp_path / "d.jsonl", *[{"text": "a b"}] * 4))
    assert data.train[0].labels == list(ids("<s> a b </s>"))
    assert not data.has_answers


def test_chats_go_through_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = load(write(tmp_path / "d.jsonl", *[{"messages": chat}] * 4))
    assert data.train[0].ids == ids("user : a assistant : b")
    data = load(write(tmp_path / "e.jsonl", *[{"prompt": chat[:1], "completion": chat[1:]}] * 4))
    assert data.train[0].labels == [IGNORED] * 5 + list(ids("b"))
    assert data.train[0].answered


def test_a_folder_has_its_splits_by_name_and_parquet_reads_the_same(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write_task(tmp_path / "json", Task(rules=2, prime=5, length=2))
    (tmp_path / "parquet").mkdir()
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (tmp_path / "json" / f"{name}.jsonl").read_text().splitlines()]
        pandas.DataFrame(rows).to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    assert load(tmp_path / "json") == load(tmp_path / "parquet")


def test_without_a_test_split_a_share_is_held_out_and_the_same_one_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[{"text": " ".join("abcdefgh"[: 1 + i % 8])} for i in range(20)])
    data = load(path, test_size=0.25)
    assert (len(data.train), len(data.test)) == (15, 5)
    assert data == load(path, test_size=0.25)
    fewer = load(path, test_size=0.25, eval_samples=2)
    assert (fewer.train, fewer.test) == (data.train, data.test[:2])


def test_what_is_held_out_can_be_had_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[{"prompt": f"a {'b ' * (i % 5)}", "completion": " c"} for i in range(20)])
    settings = settings_from({"dataset": str(path), "max_length": 32})
    assert held_out(settings, TOKENIZER) == load_data(settings, TOKENIZER).test


def test_texts_are_tokenized_together(tmp_path: Path) -> None:
    """One by one, a hundred thousand rows take minutes, and a run reads them more than once."""
    path = write(tmp_path / "d.jsonl", *[{"prompt": f"a {'b ' * i}", "completion": " c"} for i in range(20)])
    calls = []

    class Counting:
        eos_token_id = TOKENIZER.eos_token_id

        def __call__(self, texts: list[str], **options: object) -> object:
            calls.append(len(texts))
            return TOKENIZER(texts, **options)

    found = load_data(settings_from({"dataset": str(path), "max_length": 32}), Counting())
    assert found == load(path)
    assert calls == [18, 1, 2, 1]  # prompts and distinct completions of each split


def test_the_rows_that_are_held_out_stay_the_same_ones(tmp_path: Path) -> None:
    """Also in the next release, which may train on from a model of this one."""
    texts = [" ".join(f"{i:06b}".replace("0", "a").replace("1", "b")) for i in range(20)]
    data = load(write(tmp_path / "d.jsonl", *[{"text": text} for text in texts]), test_size=0.2)
    known = {ids(f"<s> {text} </s>"): number for number, text in enumerate(texts)}
    assert sorted(known[example.ids] for example in data.test) == HELD_OUT


def test_another_seed_of_training_holds_out_the_same_rows(tmp_path: Path) -> None:
    """Else a run that trains on from another's model would be judged by rows that this one had in training."""
    path = write(
        tmp_path / "d.jsonl", *[{"text": " ".join(f"{i:06b}".replace("0", "a").replace("1", "b"))} for i in range(40)]
    )
    data = load(path, seed=1)
    assert data == load(path, seed=2)
    assert data.repeated == 0
    assert set(data.test) & set(data.train) == set()


def test_held_out_rows_that_are_in_training_too_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    write(folder / "train.jsonl", {"text": "a"}, {"text": "b"})
    write(folder / "test.jsonl", {"text": "b"}, {"text": "c"}, {"text": "b"})
    assert load(folder).repeated == 2
    assert load(folder, eval_samples=1).test == load(folder).test[:1]


def test_long_examples_are_cut_and_an_answer_cut_off_whole_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *[{"prompt": "a b c d", "completion": " e"}] * 4)
    assert len(load(path, max_length=6).train[0].ids) == 6
    with pytest.raises(Fp4convError, match="no example has a token to learn within max_length 3"):
        load(path, max_length=3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}] * 3, r"has the columns question, answer; expected messages; or prompt and"),
        ([{"prompt": "a"}] * 3, "has the columns prompt"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 3, "has no chat template"),
        ([{"text": 7}] * 3, "d.jsonl, line [123]: text is int, expected text"),
        ([{"text": "a"}, {"words": "a"}, *[{"text": "a"}] * 2], "d.jsonl, line 2: has no text, which other rows have"),
        ([{"text": "a"}], "nothing is left to hold out"),
        ([], "has no rows"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(Fp4convError, match=message):
        load(write(tmp_path / "d.jsonl", *rows))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Fp4convError, match=r"holds no \.jsonl"):
        load(tmp_path / "empty")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(Fp4convError, match=r"torn.jsonl, line 2: is not JSON"):
        load(tmp_path / "torn.jsonl")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Fp4convError, match="cannot be read as parquet"):
        load(tmp_path / "torn.parquet")
    with pytest.raises(Fp4convError, match="there is no such file or folder"):
        load(tmp_path / "none.jsonl")
    for name, hint in (("d.jsonl.gz", "gunzip"), ("d.json", r"name it \.jsonl"), ("d.csv", r"write a \.jsonl file")):
        (tmp_path / name).write_text("x")
        with pytest.raises(Fp4convError, match=hint):
            load(tmp_path / name)
    with pytest.raises(Fp4convError, match="--subset b is that of a dataset of the Hub"):
        load(write(tmp_path / "d.jsonl", {"text": "a"}), subset="b")
    with pytest.raises(Fp4convError, match=r"has no split 'training'; it has test, train\n  --train-split train"):
        load(_folder(tmp_path), train_split="training")


# ---- of the Hub


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(name: str, **options: object) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    data = load_data(settings_from({"dataset": name, **options}), TOKENIZER)
    return {example.ids for example in data.train}, {example.ids for example in data.test}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_a_dataset_of_the_hub_is_read_by_its_splits_at_the_revision_that_is_asked_for(data_hub: Hub) -> None:
    card = "configs:\n- {config_name: a, data_files: a/*.jsonl}\n- {config_name: b, data_files: b/*.jsonl}\n"
    files = {"a/train.jsonl": lines("a"), "a/test.jsonl": lines("b"), "b/train.jsonl": lines("c", "d")}
    first = data_hub.add("datasets/owner/data-v1.0", {**files, "README.md": f"---\n{card}---\n".encode()})
    data_hub.change("datasets/owner/data-v1.0", {"a/train.jsonl": lines("e")})
    held_out = {ids("<s> b </s>")}
    assert texts("owner/data-v1.0", subset="a") == ({ids("<s> e </s>")}, held_out)
    assert texts("hf://datasets/owner/data-v1.0", subset="a") == ({ids("<s> e </s>")}, held_out)
    assert texts(f"owner/data-v1.0@{first}", subset="a") == ({ids("<s> a </s>")}, held_out)
    train, test = texts(f"owner/data-v1.0@{first}", subset="b")
    assert train | test == {ids("<s> c </s>"), ids("<s> d </s>")}


def test_the_commit_of_a_dataset_is_found_once(data_hub: Hub, tmp_path: Path) -> None:
    first = data_hub.add("datasets/owner/data", {"train.jsonl": lines("a", "b")})
    settings, pins = settings_from({"dataset": "owner/data"}), {"owner/tiny@main": "0" * 40}
    pinned = pin_dataset(settings, pins)
    assert pinned.dataset == f"owner/data@{first}"
    assert pins == {"owner/tiny@main": "0" * 40, "datasets/owner/data@main": first}
    second = data_hub.change("datasets/owner/data", {"train.jsonl": lines("c", "d")})
    assert pin_dataset(settings, pins) == pinned
    assert pin_dataset(settings, {}).dataset == f"owner/data@{second}"
    here = settings_from({"dataset": str(write(tmp_path / "d.jsonl", {"text": "a"}))})
    assert pin_dataset(here, {}) == here


def test_another_commit_from_the_cache_is_not_taken_for_the_one_that_is_asked_for(
    data_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The datasets library gives the newest copy that it has where the Hub does not answer."""
    first = data_hub.add("datasets/owner/data", {"train.jsonl": lines("a", "b")})
    texts("owner/data")
    with monkeypatch.context() as patched:
        offline(patched)
        pins: dict[str, str] = {}
        assert pin_dataset(settings_from({"dataset": "owner/data"}), pins).dataset == f"owner/data@{first}"
        assert pins == {"datasets/owner/data@main": first}
        texts(f"owner/data@{first}")
    second = data_hub.change("datasets/owner/data", {"train.jsonl": lines("c", "d")})
    texts("owner/data")
    offline(monkeypatch)
    with pytest.raises(Fp4convError, match=f"does not give its commit {first[:12]}, and the cache has {second[:12]}"):
        texts(f"owner/data@{first}")


def test_what_is_neither_here_nor_on_the_hub(data_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    data_hub.add("datasets/owner/data", {"train.jsonl": lines("a", "b")})
    for name, message in {
        "owner/none": "owner/none: is no file or folder, and cannot be had from the Hub: there is no such",
        "owner/data@v9": "the repository has no such revision",
        "owner/data/train": "there is no such file or folder\n  give a JSONL",
        "owner/data.jsonl": "there is no such file or folder\n  give a JSONL",
        "./data": "there is no such file or folder\n  give a JSONL",
    }.items():
        with pytest.raises(Fp4convError, match=message):
            pin_dataset(settings_from({"dataset": name}), {})
    offline(monkeypatch)
    with pytest.raises(Fp4convError, match="cannot be had from the Hub: ConnectionError"):
        pin_dataset(settings_from({"dataset": "owner/data"}), {})


def test_a_split_in_several_files_is_read_whole(tmp_path: Path) -> None:
    """Named as the Hub names them; where one is missing, that is said."""
    for number, words in enumerate(("a", "b", "c")):
        write(tmp_path / f"train-0000{number}-of-00003.jsonl", {"text": words}, {"text": words})
    write(tmp_path / "test-00000-of-00001.jsonl", {"text": "d"})
    data = load(tmp_path)
    assert [example.ids for example in data.train] == [ids(f"<s> {word} </s>") for word in "aabbcc"]
    assert [example.ids for example in data.test] == [ids("<s> d </s>")]
    (tmp_path / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(Fp4convError, match="has 2 of the 3 files of split train"):
        load(tmp_path)
    write(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(Fp4convError, match="two files of one name for split train"):
        load(tmp_path)


def test_a_folder_of_held_out_rows_alone_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", *[{"text": "a"}] * 3)
    with pytest.raises(Fp4convError, match="has no split 'train'; it has test"):
        load(tmp_path)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "data").mkdir()
    write(tmp_path / "outer" / "data" / "train.jsonl", *[{"text": "a"}] * 3)
    with pytest.raises(Fp4convError, match=r"give the folder .*outer/data"):
        load(tmp_path / "outer")


def test_a_message_without_content_is_not_the_word_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    with pytest.raises(Fp4convError, match="line 1: message 2 has no content"):
        load(write(tmp_path / "d.jsonl", *[{"messages": chat}] * 4))


DATED = "{{ strftime_now('%d %B %Y') }} " + TEMPLATE
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


MACRO = "{% macro today() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{{ today() }} "


@pytest.mark.parametrize("template", [DATED, "\n" + DATED, MACRO + TEMPLATE])
def test_templates_that_write_the_date_write_the_one_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """gpt-oss's does: tomorrow the same rows would be other examples."""
    tokenizer = tokenizer_for([*WORDS, "03", "February", "2031", str(datetime.date.today().year)])
    tokenizer.chat_template = template
    path = write(tmp_path / "d.jsonl", *[{"messages": CHAT}] * 4)
    settings = settings_from({"dataset": str(path), "chat_date": "2031-02-03"})
    found = load_data(settings, tokenizer).train[0].ids
    assert tokenizer.decode(found) == "03 February 2031 user : a assistant : b"
    alone = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert found[3:] == tuple(alone[3:])
    today = load_data(settings_from({"dataset": str(path)}), tokenizer).train[0].ids
    assert str(datetime.date.today().year) in tokenizer.decode(today).split()


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_of_a_row_reach_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_text: bool
) -> None:
    """In the columns that trl reads: a model that is to call tools must see them in training."""
    words = "{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}{{ effort }} "
    monkeypatch.setattr(TOKENIZER, "chat_template", words + TEMPLATE)
    tools: object = [{"type": "function", "function": {"name": "c", "parameters": {}}}]
    row = {"tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"effort": "d"}}
    data = load(write(tmp_path / "d.jsonl", *[{**row, "messages": CHAT}] * 4))
    assert data.train[0].ids == ids("c d user : a assistant : b")
    data = load(write(tmp_path / "e.jsonl", *[{**row, "prompt": CHAT[:1], "completion": CHAT[1:]}] * 4))
    assert data.train[0].ids == ids("c d user : a assistant : b")
    for wrong in ({"tools": "c"}, {"tools": [1]}, {"chat_template_kwargs": "d"}):
        with pytest.raises(Fp4convError, match=r"line [1-4]: (tools|chat_template_kwargs) is"):
            load(write(tmp_path / "f.jsonl", *[{**wrong, "messages": CHAT}] * 4))


def test_keys_that_only_other_rows_of_a_table_have_do_not_reach_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parquet every call of a tool has the arguments of all calls, most of them null."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)
    rows = [[{"role": "assistant", "tool_calls": [{key: "x"}]}] for key in "ab" * 4]
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "d.parquet")
    seen: list[list[dict[str, list[dict[str, str]]]]] = []

    def render(chat: list[dict[str, list[dict[str, str]]]], **_: object) -> dict[str, list[int]]:
        seen.append(chat)
        return {"input_ids": [4, 5]}

    monkeypatch.setattr(TOKENIZER, "apply_chat_template", render)
    load(tmp_path / "d.parquet", test_size=0.25)
    assert [len(chat[0]["tool_calls"][0]) for chat in seen] == [1] * 8


def test_messages_that_the_template_leaves_out_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates take what they know, in silence: gpt-oss's, one system message and no role 'human'."""
    known = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
    monkeypatch.setattr(TOKENIZER, "chat_template", known)
    told = load(write(tmp_path / "d.jsonl", *[{"messages": [{"role": "system", "content": "h"}, *CHAT]}] * 4)).notes
    assert len(told) == 1
    assert "messages that the chat template leaves out: 4" in told[0]
    assert "line 1, message 1, system" in told[0] or "line 2, message 1, system" in told[0]
    chat = [{"role": "human", "content": "g"}, CHAT[1]]
    with pytest.raises(Fp4convError, match=r"line \d: the chat template leaves out message 1, whose role is 'human'"):
        load(write(tmp_path / "e.jsonl", *[{"messages": chat}] * 4))
    with pytest.raises(Fp4convError, match="no list of objects with a role"):
        load(write(tmp_path / "f.jsonl", *[{"messages": [{"role": None, "content": "a"}]}] * 4))
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)
    assert load(tmp_path / "d.jsonl").notes == ()


def test_half_a_character_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": "a \\ud83d\\ude00"}\n{"text": "\\ud83d b"}\n')
    with pytest.raises(Fp4convError, match="line 3: has half of a character"):
        load(path)
    path.write_text('{"text": ' + "[" * 100_000)
    with pytest.raises(Fp4convError, match="line 1: is not JSON"):
        load(path)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n' * 3)
    assert load(tmp_path / "d.jsonl").train[0].ids == ids("<s> a </s>")


def test_what_is_cut_or_left_out_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "completion": " c"}] * 8
    long = [{"prompt": "a b", "completion": " c d e f g h"}, {"prompt": " ".join("abcdefgh"), "completion": " c"}]
    write(tmp_path / "train.jsonl", *rows, *long, {"prompt": "a", "completion": ""})
    write(tmp_path / "test.jsonl", *rows, *long)
    data = load(tmp_path, max_length=6, max_new_tokens=1)
    assert (len(data.train), len(data.test)) == (9, 9)
    assert [example.answered for example in data.test] == [True] * 8 + [False], "half an answer cannot be given right"
    cut, left, answers = data.notes
    assert cut.startswith("examples longer than max_length 6, which are cut: 4")
    assert left == "examples without a token to learn, which are left out: 3"
    assert answers.startswith("answers of more than 1 tokens")
    assert answers.endswith("8 (--max-new-tokens)")
    assert not load(tmp_path / "test.jsonl").notes


def test_a_split_that_is_not_read_is_told(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[{"text": "a"}] * 3)
    write(tmp_path / "validation.jsonl", *[{"text": "b"}] * 3)
    assert "--test-split validation" in load(tmp_path).notes[0]
    assert load(tmp_path, test_split="validation").notes == ()


def test_rows_of_nothing_but_empty_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Fp4convError, match="no example has a token to learn"):
        load(write(tmp_path / "d.jsonl", *[{"text": ""}] * 9))


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "splits"
    folder.mkdir()
    for name in ("train", "test"):
        write(folder / f"{name}.jsonl", *[{"text": "a"}] * 3)
    return folder


def test_defaults_hold_no_dataset() -> None:
    assert Settings().dataset is None
