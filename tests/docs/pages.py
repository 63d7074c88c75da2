"""The documentation as data: its pages, their headings, links and code blocks."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        language: the word after the fence, or "".
        text: without the fences.
        heading: the nearest heading above it.
        name: what `<!-- file: name -->` right above it says, or "".
    """

    language: str
    text: str
    heading: str
    name: str


@dataclass(frozen=True)
class Page:
    """One page, by its path below the repository."""

    path: str

    @property
    def file(self) -> Path:
        """Where it is."""
        return ROOT / self.path

    @property
    def text(self) -> str:
        """All of it."""
        return self.file.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text without fenced blocks."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)

    def headings(self) -> list[str]:
        """Headings of every level, in order."""
        return re.findall(r"^#+ (.+)$", self.prose, flags=re.MULTILINE)

    def anchors(self) -> set[str]:
        """What a link's fragment can name, as GitHub makes it of headings."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in self.headings()}

    def sections(self) -> dict[str, str]:
        """Text under each heading of the second level, deeper ones included."""
        parts = re.split(r"^## (.+)$", self.text, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    def blocks(self) -> list[Block]:
        """Fenced blocks, in order."""
        found: list[Block] = []
        pattern = r"^#+ [^\n]+$|(?:^<!-- file: ([^\n]+?) -->\n)?^```(\w*)\n(.*?)^```$"
        heading = ""
        for match in re.finditer(pattern, self.text, flags=re.DOTALL | re.MULTILINE):
            if match[0].startswith("#"):
                heading = match[0].splitlines()[0].lstrip("# ")
            else:
                found.append(Block(match[2], match[3], heading, match[1] or ""))
        return found

    def links(self) -> list[str]:
        """Targets of links, without those in code."""
        prose = re.sub(r"`[^`\n]*`", "", self.prose)
        return re.findall(r"\]\(([^)\s]+)\)", prose)


@cache
def pages() -> tuple[Page, ...]:
    """Every page that is kept by hand."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "skink").rglob("*.md"))
    return tuple(Page(path.relative_to(ROOT).as_posix()) for path in found)


def page(path: str) -> Page:
    """The page at `path`."""
    return next(entry for entry in pages() if entry.path == path)
