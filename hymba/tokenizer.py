"""Text to token ids and back: train, load, save, encode, decode, stream, chat template.

A thin skin over `tokenizers.Tokenizer` (Rust). It adds what that class leaves to its users: which
ids begin, end and pad a text, a folder that `transformers.AutoTokenizer` reads too, a decoder for
streams that never shows half a character, and the folder's chat template. It does not invent a
chat format for a tokenizer that has none, and it knows nothing of models.

    tokenizer = Tokenizer.train(texts, vocab_size=4096)
    ids = tokenizer.encode("def f():", bos=True)
    tokenizer.save("folder"); Tokenizer.from_folder("folder").decode(ids)
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from hymba.errors import UserError
from hymba.files import write_bytes

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2, as in the released checkpoints
BYTES = 256

# Every file a tokenizer may consist of; what a folder has is kept byte for byte when saved again.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


class TokenizerError(UserError):
    """A tokenizer that cannot be read, trained or used as asked; the message says what to do."""


class Tokenizer:
    """A tokenizer and the files it consists of (`files`: name -> bytes, written by `save`)."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        # Two readings of one vocabulary: in plain text "</s>" is four characters, in a rendered
        # chat template it is the token. The switch is state inside the Rust object, hence two.
        self._marked = _parse(self.files["tokenizer.json"])
        self._plain = _parse(self.files["tokenizer.json"])
        self._plain.encode_special_tokens = True
        self._settings = _json(self.files, "tokenizer_config.json")
        named = _json(self.files, "special_tokens_map.json") | self._settings
        self.bos_id = self._special_id(named, "bos_token", BOS)
        self.eos_id = self._special_id(named, "eos_token", EOS)
        self.pad_id = self._special_id(named, "pad_token", PAD)
        added = self._marked.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    # ---- where a tokenizer comes from, where it goes

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
        """A byte-level BPE of at most `vocab_size` tokens learnt from `texts`.

        Every text is representable (all 256 bytes are tokens), so there is no unknown token. Ids 0,
        1, 2 are <pad>, <s>, </s>. A small corpus may give fewer tokens than asked for. The result
        depends on the texts alone. `progress` draws the library's bar on standard error.
        """
        smallest = BYTES + 3
        if vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size {vocab_size} is too small: 256 bytes and 3 special tokens need "
                f"{smallest} or more"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        inner.train_from_iterator(texts, trainer)
        # So that transformers' call and Llama's habit agree: tokenizer("x") begins with <s>.
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS} $B",
            special_tokens=[(BOS, inner.token_to_id(BOS))],
        )
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        return cls(
            {
                "tokenizer.json": inner.to_str(pretty=True).encode(),
                "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
            }
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder; TokenizerError where it has no tokenizer.json."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(
                f"{folder} has no tokenizer.json: give a folder that holds a tokenizer"
            )
        present = (name for name in TOKENIZER_FILES if (folder / name).is_file())
        return cls({name: (folder / name).read_bytes() for name in present})

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into `folder` (made if absent), each one whole or not at all.

        `transformers.AutoTokenizer.from_pretrained(folder)` reads the result.
        """
        for name, content in self.files.items():
            write_bytes(Path(folder) / name, content)

    # ---- facts

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: one more than the largest id, special tokens included."""
        return max(self._marked.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json: equal exactly when the same text gives the same ids."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder brought a chat template (no other format is ever assumed)."""
        return "chat_template.jinja" in self.files or bool(self._settings.get("chat_template"))

    # ---- text to ids

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`; with `bos` the id that begins a text is put in front.

        Text that looks like a special token stays text, so that no input can end a document or
        play another role, unless `special` says that it was rendered by a chat template.
        """
        inner = self._marked if special else self._plain
        try:
            ids: list[int] = inner.encode(text, add_special_tokens=False).ids
        except TypeError:  # half a surrogate pair, which bytes that are no UTF-8 become too
            raise TokenizerError("this is no text: a string in valid UTF-8 is needed") from None
        return [self._require("bos"), *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, over all cores (no `bos`)."""
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def chat(
        self,
        messages: Sequence[Message],
        reply: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation in the folder's own chat format, ending where a `reply` begins.

        `tools` (OpenAI's descriptions) are handed to the template, which may ignore them.
        TokenizerError where the tokenizer has no chat template, or the template refuses.
        """
        if not self.has_chat_template:
            raise TokenizerError(
                "this tokenizer has no chat template: give plain text, or a checkpoint that was "
                "trained on conversations"
            )
        return self.encode(self._render(messages, reply, tools), special=True)

    def prepare_chat(self) -> None:
        """Load what the first `chat` would load."""
        _ = self._template

    # ---- ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._marked.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What one token adds inside a text, maybe half a character; a special token's own name;
        b"" for ids that are no token."""
        piece: str | None = self._marked.id_to_token(token)
        if piece is None or token in self.special_ids:
            return (piece or "").encode()
        if self._byte_of is not None and all(letter in self._byte_of for letter in piece):
            return bytes(self._byte_of[letter] for letter in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        # Behind a letter, because some decoders strip the space that begins a text.
        letter = self.encode("a")[-1:]
        return self.decode([*letter, token])[len(self.decode(letter)) :].encode()

    def stream(self, begins: bool = True) -> TextStream:
        """A fresh decoder for ids that arrive one at a time. Some decoders strip the space that
        begins a text; `begins` says whether these ids do, or continue one."""
        return TextStream(self, begins)

    # ---- inside

    def _require(self, name: str) -> int:
        found: int | None = getattr(self, f"{name}_id")
        if found is None:
            raise TokenizerError(f"this tokenizer names no {name}_token in tokenizer_config.json")
        return found

    def _special_id(self, named: Mapping[str, Any], key: str, habit: str) -> int | None:
        token = named.get(key, habit)
        text = token.get("content") if isinstance(token, Mapping) else token
        found: int | None = self._marked.token_to_id(text) if isinstance(text, str) else None
        return found

    @functools.cached_property
    def _template(self) -> Callable[..., str]:
        """transformers' renderer of the folder's chat template; loading it takes a second."""
        from transformers import AutoTokenizer  # only a chat needs it, and it is slow to import

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            render: Callable[..., str] = AutoTokenizer.from_pretrained(folder).apply_chat_template
        return render

    def _render(
        self,
        messages: Sequence[Message],
        reply: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        from jinja2 import TemplateError

        render = self._template
        try:
            return render(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=reply,
            )
        except (TemplateError, TypeError, ValueError) as error:  # a template is code of its folder
            raise TokenizerError(f"the chat template refuses these messages: {error}") from error

    @functools.cached_property
    def _byte_of(self) -> dict[str, int] | None:
        """The byte behind each letter of a byte-level vocabulary; None for other vocabularies."""
        if not isinstance(self._marked.decoder, decoders.ByteLevel):
            return None
        # The alphabet's rule: printable bytes stand for themselves, the others, in their order,
        # for the letters from U+0100 on.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (byte for byte in range(BYTES) if byte not in printable)
        letters = {chr(byte): byte for byte in printable}
        return letters | {chr(BYTES + i): byte for i, byte in enumerate(others)}


class TextStream:
    """Decodes ids one at a time; its pieces joined are `decode` of all ids together.

    Only whole characters come out: while the last ones could still change (a character of several
    bytes may be spread over several tokens) they are held back. Ids whose text is out are
    forgotten, so a push costs the same however long the text is.

    One exception: where byte tokens are a fallback, `decode` turns a whole run of them into marks
    if the run holds one wrong byte; the stream has shown the good characters before it by then
    (and a U+FFFD written in such bytes is taken for half a character).
    """

    # Half a character shows as at most 3 marks: one for byte-level decoders, one for each byte
    # where byte tokens are a fallback; the fourth byte would complete it.
    _HELD = 3

    def __init__(self, tokenizer: Tokenizer, begins: bool = True) -> None:
        self._tokenizer = tokenizer
        # After the start an id is decoded behind the id of a plain letter: some decoders strip the
        # space that begins a text, and only the first id begins one.
        self._letter = tokenizer.encode("a")[-1:]
        self._ids: list[int] = [] if begins else self._letter.copy()
        self._shown = len(self._ids)  # characters of the ids' text that came out already

    def push(self, token: int) -> str:
        """Text that `token` makes certain, often empty or more than one character."""
        if token in self._tokenizer.special_ids:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        certain = _without_last_marks(text, self._HELD)
        fresh = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if text and certain == text:  # no text: the first id may have been a bare space
            self._ids, self._shown = self._letter.copy(), len(self._letter)
        return fresh

    def finish(self) -> str:
        """What was held back (a broken end shows as U+FFFD); the stream starts anew after it."""
        rest = self._tokenizer.decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return rest


def _without_last_marks(text: str, most: int) -> str:
    end = len(text)
    while end > 0 and text[end - 1] == "\ufffd" and len(text) - end < most:
        end -= 1
    return text[:end]


def _parse(content: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the Rust side raises bare Exception
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise TokenizerError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{name} must hold a JSON object")
    return content
