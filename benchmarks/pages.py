"""One Markdown page per device, with a section per theme; a new measurement replaces only its section."""

import importlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import attrs
import torch

VERSIONS = ("torch", "triton", "numpy", "scikit-learn", "torchvision")
NONE = "-"  # in a cell: not measured


@attrs.frozen(kw_only=True)
class Table:
    """One table with its remarks and figures."""

    title: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    remarks: tuple[str, ...] = ()
    figures: Mapping[str, bytes] = attrs.field(factory=dict)  # PNG files, by the end of their names

    def markdown(self, slug: str) -> str:
        """Returns the table as Markdown.

        Args:
            slug: Prefix of the names of the figures' files.
        """
        parts = [f"### {self.title}"]
        if self.header:
            lines = [self.header, ("---",) * len(self.header), *self.rows]
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        parts += [f"![{self.title}]({slug}-{name}.png)" for name in self.figures]
        parts += self.remarks
        return "\n\n".join(parts)


def save_theme(
    folder: Path, device: torch.device, theme: str, tables: Sequence[Table], *, order: Sequence[str], command: str
) -> str:
    """Replaces the tables of a theme on the page of a device, and returns their Markdown.

    Args:
        folder: Of the page and its figures; made if need be.
        device: The measured device.
        theme: The section's title.
        tables: Their new content.
        order: The titles of all themes, in the page's order.
        command: What the tables were made with.
    """
    slug = slug_of(device)
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for name, png in table.figures.items():
            (folder / f"{slug}-{name}.png").write_bytes(png)
    section = "\n\n".join([f"Measured by `{command}` with {environment(device)}."] + [t.markdown(slug) for t in tables])
    page = folder / f"{slug}.md"
    sections = _sections(page.read_text(encoding="utf-8")) if page.exists() else {}
    sections[theme] = section
    known = [title for title in order if title in sections]
    titles = known + [title for title in sections if title not in known]
    text = "\n\n".join([f"# {device_name(device)}"] + [f"## {title}\n\n{sections[title]}" for title in titles])
    page.write_text(text + "\n", encoding="utf-8")
    return f"## {theme}\n\n{section}"


def environment(device: torch.device) -> str:
    """Returns versions and numbers of threads in one line."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version}" for name in VERSIONS if (version := _version(name))]
    if device.type == "cuda":
        versions.append(f"CUDA {torch.version.cuda}")
    versions.append(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads where nothing else is said")
    return ", ".join(versions)


def device_name(device: torch.device) -> str:
    """Returns what the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {_cpu_model()}"


def slug_of(device: torch.device) -> str:
    """Returns the hardware's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def present(module: str) -> bool:
    """Returns whether an optional package can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def milliseconds(seconds: float | None) -> str:
    """Returns a cell of a time in ms, with three digits; a dash of None."""
    return NONE if seconds is None else significant(seconds * 1000)


def ratio(numerator: float | None, denominator: float | None) -> str:
    """Returns a cell of a quotient, with three digits; a dash where one of them is None."""
    return NONE if numerator is None or denominator is None else significant(numerator / denominator)


def significant(value: float) -> str:
    """Returns a number with three digits and no exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _sections(text: str) -> dict[str, str]:
    """The page's sections by title."""
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
