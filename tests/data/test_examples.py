"""Lines of `.jsonl` become prompts and responses in turn; what is no example is named."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megadiff.data.corpus import Corpus
from megadiff.data.documents import Document, DocumentSource
from megadiff.data.examples import ExampleFormat
from megadiff.data.preprocess import PrepareConfig, prepare

CONVERSATION = [
    {"role": "system", "content": "Be {role}."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Thr\ud800ee?"},
    {"role": "assistant", "content": " {content}\n"},
    {"role": "user", "content": "never answered"},
]


def source_of(folder: Path, *lines: Any) -> DocumentSource:
    (folder / "examples.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    return DocumentSource((str(folder),), read_example=ExampleFormat().document)


def test_prompts_and_responses(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("of the data set")
    source = source_of(tmp_path, {"prompt": "", "response": "é"}, {"messages": CONVERSATION})
    assert list(source) == [
        (b"", "é".encode()),
        (
            b"<|system|>\nBe {role}.\n<|user|>\nOne?\n<|assistant|>\n",
            b"Two.",
            b"\n<|user|>\nThr\xed\xa0\x80ee?\n<|assistant|>\n",
            b" {content}\n",
        ),
    ]
    assert source.skipped == {"hidden": 0, "not .jsonl": 1}


def test_a_template_of_ones_own() -> None:
    written = ExampleFormat("[{role}: {content}]").document({"messages": CONVERSATION[1:3]})
    assert written == (b"[user: One?][assistant: ", b"Two.")
    for template in ("no places", "{content} by {role}", "{role}", "{role} {content} {content}"):
        with pytest.raises(ValueError, match=r"chat_template must hold \{role\} and, after it, \{content\} once, got"):
            ExampleFormat(template)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"prompt": "?"}, r"expected .* 'prompt' and 'response', or 'messages', got the fields \['prompt'\]"),
        (["prompt", "response"], r"expected .*, got a list; mend the line"),
        ({"prompt": None, "response": "!"}, "expected a string in the field 'prompt', got a NoneType"),
        ({"prompt": "?", "response": ""}, "a response is empty"),
        ({"messages": "hello"}, "expected a list in the field 'messages', got a str"),
        ({"messages": CONVERSATION[:2]}, "expected a message of the role 'assistant', got none"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"a 'role' of system, user, assistant .*'tool'"),
        ({"messages": [{"role": "assistant"}]}, "and a 'content', got"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "a response is empty"),
        ({"messages": [{"role": "user", "content": ["?"]}]}, "expected a string in the field 'content', got a list"),
    ],
)
def test_what_is_no_example_is_named(tmp_path: Path, line: Any, complaint: str) -> None:
    source = source_of(tmp_path, {"prompt": "?", "response": "!"}, line)
    with pytest.raises(ValueError, match=f"examples.jsonl, line 3: .*{complaint}"):
        list(source)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (tmp_path / "examples.jsonl").write_text('{"prompt": "cut')
    with pytest.raises(ValueError, match=r"examples.jsonl, line 1: not JSON"):
        list(source)


def write_examples(path: Path, documents: list[Document]) -> None:
    lines = [{"prompt": prompt.decode(), "response": response.decode()} for prompt, response in documents]
    path.write_text("\n".join(map(json.dumps, lines)))


def test_a_corpus_knows_its_parts_and_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    documents = [(b"What is %d times 2?" % n, b"It is %d." % (2 * n)) for n in range(50)]
    write_examples(path, documents)

    def make(**changes: Any) -> str:
        options: dict[str, Any] = {"kind": "examples", "vocab_size": 300, "validation_fraction": 0.1}
        options |= {"input": (str(path),), "output_dir": tmp_path / "corpus"}
        return prepare(PrepareConfig(**options | changes)).fingerprint

    made = make()
    corpus = Corpus.open(tmp_path / "corpus")
    assert (corpus.manifest.kind, corpus.manifest.chat_template) == ("examples", "<|{role}|>\n{content}\n")
    found = []
    for split in ("train", "validation"):
        stream = corpus.split(split)
        lengths, per_document = stream.sequences()
        assert (per_document == 2).all() and lengths.sum() == stream.num_tokens
        places = [0, *lengths.cumsum().tolist()]
        parts = [stream.tokens(a, b - a).tolist() for a, b in itertools.pairwise(places)]
        assert all(part[-1] == corpus.tokenizer.eos_id for part in parts[1::2])
        texts = list(map(corpus.tokenizer.decode_bytes, parts))
        found += list(zip(texts[::2], texts[1::2], strict=True))
    assert sorted(found) == sorted(documents)

    # The same bytes with another border are another corpus; so are texts.
    write_examples(path, [(prompt + response[:1], response[1:]) for prompt, response in documents])
    assert make() != made
    assert make(kind="text", text_key="prompt") != make(kind="text", text_key="response")
    assert Corpus.open(tmp_path / "corpus").manifest.kind == "text"
    assert make(kind="examples") != made


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind is examples, but there is no input; give --input with .jsonl"):
        PrepareConfig(kind="examples", output_dir=tmp_path)
    path = tmp_path / "examples.jsonl"
    write_examples(path, [(b"?", b"!")])
    with pytest.raises(ValueError, match=r"needs two different documents, .* got 1 from 1 files"):
        prepare(PrepareConfig(kind="examples", input=(str(path),), output_dir=tmp_path / "corpus", vocab_size=300))
