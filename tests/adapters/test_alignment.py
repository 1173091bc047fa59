from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from filigrane.adapters.models import LoadedModel, LoadedTokenizer, fingerprint
from filigrane.errors import EvidenceError, VocabularyMismatch
from filigrane.radioactivity.evidence import Document, Reading

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from filigrane.adapters.alignment import Alignment, Vocabulary  # noqa: E402
from filigrane.adapters.reading import NO_BORDER, read  # noqa: E402

CORPUS = [
    "The sea in winter is grey and the gulls are loud above the harbour wall.",
    "A café in Zürich sells naïve paintings; the señor pays 12 €, the others less.",
    "Nothing in the harbour moves, nothing in the winter town, nothing at all in the café.",
    "日本語のテキストもある。😀 and emojis 🎉🎉 too,\n\nwith new lines\tand tabs.",
    "def winter(sea):\n    return [gull for gull in sea if gull.loud]\n",
] * 4
TEXT = (
    "In winter the café above the harbour is naïve. 日本 😀🎉\n\n    return the sea, señor Zürich!"
)


def wrap(backend: Any, **special: str) -> LoadedTokenizer:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    return LoadedTokenizer("made here", len(tokenizer), fingerprint(tokenizer), tokenizer)


def bytewise(size: int, *specials: str) -> LoadedTokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return wrap(backend, **({"eos_token": specials[0]} if specials else {}))


def unigram(size: int) -> LoadedTokenizer:
    """As sentencepiece makes them: a metaspace before every word, the first included."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_like() -> LoadedTokenizer:
    """Llama-2's way: a normaliser, bytes for unknown letters, a decoder of four parts."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({c for text in CORPUS for c in text if c.isascii() and c not in " \n\t"})
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁", "w"),
        ("i", "n"),
        ("▁w", "in"),
        ("c", "a"),
    ]
    pieces += ["▁", *letters, *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encode(loaded: LoadedTokenizer, text: str = TEXT) -> list[int]:
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


MAKERS: dict[str, Callable[[], LoadedTokenizer]] = {
    "bytes": lambda: bytewise(600, "<end>"),
    "few merges": lambda: bytewise(300, "<other>", "<end>"),
    "unigram": lambda: unigram(220),
    "llama": llama_like,
}
MADE: dict[str, LoadedTokenizer] = {}


def made(name: str) -> LoadedTokenizer:
    if name not in MADE:
        MADE[name] = MAKERS[name]()
    return MADE[name]


@pytest.mark.parametrize("name", ["bytes", "few merges", "llama"])
def test_tokens_are_spelled_in_bytes(name: str) -> None:
    tokenizer = made(name)
    spelled = Vocabulary(tokenizer.tokenizer).spelled
    joined = b"".join(spelled[token] for token in encode(tokenizer))
    assert joined.decode() in (TEXT, " " + TEXT)  # sentencepiece puts a space first


@pytest.mark.parametrize("writer", MAKERS)
@pytest.mark.parametrize("suspect", MAKERS)
def test_rows_are_where_both_have_read_the_same(writer: str, suspect: str) -> None:
    mine, theirs = made(writer), made(suspect)
    text = TEXT if "unigram" not in (writer, suspect) else "The winter in the café is loud, señor."
    ids = encode(mine, text)
    aligned = Alignment(mine, theirs, limit=0.0).align(ids)
    found = 0
    for t, row in enumerate(aligned.rows):
        left = mine.tokenizer.decode(ids[: t + 1])
        if row < 0:
            continue
        right = theirs.tokenizer.decode(aligned.tokens[: row + 1], skip_special_tokens=True)
        if "\N{REPLACEMENT CHARACTER}" not in left + right:  # not a part of a character
            assert left.strip() == right.strip()
            found += 1
    assert found >= 3 and aligned.rows[-1] == len(aligned.tokens) - 1
    if writer == suspect:
        assert (aligned.rows >= 0).all()
        assert aligned.tokens.tolist() == theirs.tokenizer(text)["input_ids"][: len(aligned.tokens)]


def test_no_border_is_missed_and_none_is_invented() -> None:
    mine, theirs = made("bytes"), made("few merges")
    ids = encode(mine)
    spelled, other = Vocabulary(mine.tokenizer).spelled, Vocabulary(theirs.tokenizer).spelled
    aligned = Alignment(mine, theirs).align(ids)
    borders = np.cumsum([len(other[token]) for token in aligned.tokens.tolist()]).tolist()
    ends = np.cumsum([len(spelled[token]) for token in ids]).tolist()
    expected = [borders.index(end) if end in borders else -1 for end in ends]
    assert aligned.rows.tolist() == expected
    assert min(expected) == -1 or set(ends) <= set(borders)
    characters = {len(TEXT[:i].encode()) for i in range(len(TEXT) + 1)}
    assert any(end not in characters and row >= 0 for end, row in zip(ends, expected, strict=True))


def test_probabilities_move_to_tokens_of_the_same_bytes() -> None:
    mine, theirs = made("bytes"), made("unigram")
    alignment = Alignment(mine, theirs)
    spelled, other = Vocabulary(mine.tokenizer).spelled, Vocabulary(theirs.tokenizer).spelled
    assert alignment.mapping.shape == (theirs.tokenizer_size,)
    known = set(spelled.values())
    for number, target in enumerate(alignment.mapping.tolist()):
        if target < alignment.vocab_size:
            assert spelled[target] == other[number]
        else:
            assert number not in other or other[number] not in known
    words = {name: n for name, n in theirs.tokenizer.get_vocab().items() if name[0] == "▁"}
    mapped = {name: alignment.mapping[n] for name, n in words.items()}
    pairs = [(name, n) for name, n in mapped.items() if n < alignment.vocab_size]
    assert len(pairs) > 3
    for name, number in pairs:
        assert mine.tokenizer.decode([number]) == name.replace("▁", " ")


def test_several_tokens_of_one_spelling_add_up() -> None:
    mine, theirs = made("bytes"), made("llama")
    alignment = Alignment(mine, theirs)
    plain, raw = theirs.tokenizer.convert_tokens_to_ids(["a", "<0x61>"])
    assert plain != raw and alignment.mapping[plain] == alignment.mapping[raw]
    model = llama(theirs.tokenizer_size, zero=True)  # every token equally likely
    (reading,) = read(
        model, [Document(tokens=np.asarray(encode(mine)))], 1, alignment=alignment, top=10**6
    )
    part = slice(reading.starts[0], reading.starts[1])
    law = dict(zip(reading.tokens[part].tolist(), reading.suspect[part].tolist(), strict=True))
    twice = alignment.mapping[plain]
    assert law[twice] == pytest.approx(2 / theirs.tokenizer_size, rel=1e-4)
    mapped = (alignment.mapping < alignment.vocab_size).sum() / theirs.tokenizer_size
    assert alignment.summary().mass == pytest.approx(mapped, rel=1e-4)


def test_special_tokens() -> None:
    mine, theirs = made("bytes"), made("few merges")  # both have <end>, only one has <other>
    end, its = (m.tokenizer.convert_tokens_to_ids("<end>") for m in (mine, theirs))
    alignment = Alignment(mine, theirs)
    assert end != its and alignment.mapping[its] == end
    aligned = alignment.align([*encode(mine, "the sea"), end, *encode(mine, "the café")])
    assert its in aligned.tokens.tolist() and aligned.rows[-1] == len(aligned.tokens) - 1
    back = Alignment(theirs, mine)
    other = theirs.tokenizer.convert_tokens_to_ids("<other>")
    assert other not in back.mapping
    ids = [*encode(theirs, "the sea"), other, *encode(theirs, " and")]
    aligned = back.align(ids)  # unknown to the suspect: not shown, and no bytes of the text
    assert mine.tokenizer.decode(aligned.tokens) == "the sea and"
    place = ids.index(other)
    assert aligned.rows[place] == aligned.rows[place - 1] >= 0
    # What a tokenizer puts around a text: the start is shown, the end is not.
    around = Alignment(mine, made("unigram")).align(encode(mine, "the sea"))
    assert around.tokens[0] == 0 and 1 not in around.tokens


def test_what_stands_before_the_first_word() -> None:
    mine, theirs = made("few merges"), made("unigram")
    other = mine.tokenizer.convert_tokens_to_ids("<other>")
    aligned = Alignment(mine, theirs).align([other, *encode(mine, "日本")])
    # The start token, the space of the convention, then text: its law follows the last of these.
    assert theirs.tokenizer.convert_ids_to_tokens(aligned.tokens[:2].tolist()) == ["<s>", "▁"]
    assert aligned.rows[0] == 1


def test_text_that_ends_inside_a_character() -> None:
    mine, theirs = made("few merges"), made("bytes")
    ids = encode(mine, "the café 日")
    spelled = Vocabulary(mine.tokenizer).spelled
    assert len(spelled[ids[-1]]) < 3
    aligned = Alignment(mine, theirs).align([*ids[:-1], *encode(mine, " and the sea")])
    assert aligned.rows[-1] == len(aligned.tokens) - 1
    broken = b"".join(spelled[token] for token in ids[:-1])
    assert "\N{REPLACEMENT CHARACTER}" in broken.decode(errors="replace")
    assert theirs.tokenizer.decode(aligned.tokens).endswith("\N{REPLACEMENT CHARACTER} and the sea")
    assert Alignment(mine, theirs).align([]).rows.tolist() == []


def test_a_tokenizer_that_changes_the_text_is_aligned_by_offsets() -> None:
    theirs = bytewise(400)
    theirs.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    ids = encode(made("bytes"), "The Sea In Winter, The Harbour: nothing.")
    aligned = Alignment(made("bytes"), theirs).align(ids)
    assert (aligned.rows >= 0).sum() > 5
    for t in np.flatnonzero(aligned.rows >= 0):
        left = made("bytes").tokenizer.decode(ids[: t + 1]).lower()
        assert theirs.tokenizer.decode(aligned.tokens[: aligned.rows[t] + 1]) == left


def llama(size: int, *, zero: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=256, initializer_range=0.4,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        ).eval()  # fmt: skip
    if zero:
        with torch.no_grad():
            model.lm_head.weight.zero_()
    return model


def joined(model: Any, ids: list[int], alignment: Alignment | None, **options: Any) -> Reading:
    document = Document(tokens=np.asarray(ids), start=2)
    return Reading.join(list(read(model, [document], 1, alignment=alignment, **options)))


def test_reading_through_an_alignment_with_oneself_changes_nothing() -> None:
    mine = made("bytes")
    model, ids = llama(mine.tokenizer_size), encode(mine)
    plain = joined(model, ids, None)
    through = joined(model, ids, Alignment(mine, mine))
    # Where the whole text is cut otherwise than what precedes a token, that is shown instead.
    cut = Alignment(mine, mine)
    same = [
        row
        for row, window in enumerate(plain.windows[:, 0].tolist())
        if cut.align(ids[: ids.index(window) + 1]).tokens.tolist() == ids[: ids.index(window) + 1]
    ]
    assert len(same) > 0.6 * len(plain)
    assert np.array_equal(plain.windows, through.windows)
    for row in same:
        part = slice(plain.starts[row], plain.starts[row + 1])
        assert np.allclose(plain.suspect[part], through.suspect[part], atol=1e-6)
        assert plain.tokens[part][0] == through.tokens[part][0]
    assert through.ledger == plain.ledger | {NO_BORDER: 0}


def test_reading_a_suspect_with_another_tokenizer() -> None:
    mine, theirs = made("bytes"), made("few merges")
    model, base = llama(theirs.tokenizer_size), llama(theirs.tokenizer_size, zero=True)
    ids, alignment = encode(mine), Alignment(mine, theirs)
    aligned = alignment.align(ids)
    reading = joined(model, ids, alignment, base=base, top=4)
    assert reading.vocab_size == mine.tokenizer_size and reading.base is not None
    used = 0
    for t in range(2, len(ids) - 1):
        # What precedes a guess, cut without what follows: the mark chose that.
        before = alignment.align(ids[: t + 1])
        if ids[t] in ids[:t] or before.rows[-1] < 0:
            continue
        shown = before.tokens[: before.rows[-1] + 1]
        with torch.inference_mode():
            law = model(torch.from_numpy(shown)[None]).logits[0, -1].softmax(-1).numpy()
        expected = np.zeros(mine.tokenizer_size + 1)
        np.add.at(expected, alignment.mapping, law)
        part = slice(reading.starts[used], reading.starts[used + 1])
        assert reading.windows[used, 0] == ids[t]
        assert reading.tokens[part][0] == expected[:-1].argmax()
        assert np.allclose(reading.suspect[part], expected[reading.tokens[part]], atol=1e-6)
        used += 1
    ledger = reading.ledger
    assert used == len(reading) == ledger["scored"] and list(ledger)[-1] == "scored"
    assert ledger["candidates"] == sum(v for k, v in ledger.items() if k != "candidates")
    report = alignment.summary()
    assert report.positions == len(ids) and report.rate == (aligned.rows >= 0).mean()
    assert report.mass is not None and 0.1 < report.mass <= 1.0
    joined(model, ids[:9], alignment)  # a run that goes on: the rate is that of all its texts
    assert alignment.summary().positions == len(ids)


def test_too_little_in_common_is_refused_before_anything_is_read() -> None:
    mine, theirs = made("few merges"), made("bytes")
    ids = encode(mine)
    rate = (Alignment(mine, theirs).align(ids).rows >= 0).mean()
    assert 0.2 < rate < 0.9
    with pytest.raises(EvidenceError, match=r"only \d.*closed mode"):
        joined(llama(theirs.tokenizer_size), ids, Alignment(mine, theirs, limit=rate + 0.01))
    joined(llama(theirs.tokenizer_size), ids, Alignment(mine, theirs, limit=rate - 0.01))
    with pytest.raises(ValueError, match="share of positions"):
        Alignment(mine, theirs, limit=2)


def test_tokenizers_that_cannot_be_spelled_are_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}))
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(EvidenceError, match=r"is neither.*closed mode"):
        Alignment(made("bytes"), wrap(backend, unk_token="[UNK]"))
    with pytest.raises(EvidenceError, match="fast tokenizer"):
        Vocabulary(object())


def test_an_alignment_of_other_tokenizers_is_refused() -> None:
    mine, theirs = made("bytes"), made("few merges")
    model = llama(mine.tokenizer_size)
    size, sha = mine.tokenizer_size, mine.tokenizer_sha256
    wrong = LoadedModel("x", size, size, sha, model, mine.tokenizer)
    documents = [Document(tokens=np.arange(5))]
    with pytest.raises(VocabularyMismatch, match="than the suspect's"):
        read(wrong, documents, 1, alignment=Alignment(mine, theirs))
    with pytest.raises(VocabularyMismatch, match="vocabulary of 999, the alignment"):
        read(wrong, documents, 1, alignment=Alignment(mine, mine), vocab_size=999)
    with pytest.raises(VocabularyMismatch, match="than the documents'"):
        read(wrong, documents, 1, alignment=Alignment(theirs, mine), tokenizer_sha256=sha)


@pytest.mark.model
def test_a_real_tokenizer(smollm2: LoadedModel) -> None:
    for name in ("unigram", "llama", "bytes"):
        theirs = made(name)
        text = "The sea in winter is grey and the gulls are loud above the harbour wall."
        ids = [1, *smollm2.tokenizer(text)["input_ids"], 2]
        alignment = Alignment(smollm2, theirs)
        assert alignment.vocab_size == smollm2.vocab_size
        aligned = alignment.align(ids)
        assert (aligned.rows >= 0).mean() > 0.85  # most borders are those of small tokens, too
        reading = joined(llama(theirs.tokenizer_size), ids, alignment)
        assert len(reading) > 10
