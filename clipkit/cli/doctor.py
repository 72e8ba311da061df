"""What is installed, which device will be used and why, and which versions are known not to work together.

Nothing is imported to learn a version; only torch is, in the end, to ask it for its devices.
"""

import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clipkit.config import to_json
from clipkit.errors import UserError
from clipkit.jobs.spark import java_problem


def declared_packages() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """What clipkit needs by its own metadata, and what each extra adds."""
    metadata = importlib.metadata.metadata("clipkit")
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    core = tuple(package.name for package in needed if package.marker is None)
    extras = {
        extra: tuple(
            package.name
            for package in needed
            if package.marker and package.marker.evaluate({"extra": extra}) and package.name not in core
        )
        for extra in metadata.get_all("Provides-Extra") or []
        if extra not in ("dev", "all")
    }
    return core, extras


CORE, EXTRAS = declared_packages()


@dataclass(frozen=True)
class Findings:
    """What `clipkit doctor` found. A problem is something that will fail; a note is something to know."""

    python: str
    versions: dict[str, str | None]
    device: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """The findings as JSON values."""
        found: dict[str, object] = to_json(self)
        return found


def examine() -> Findings:
    """Look at this environment. Raises nothing: what fails is a finding."""
    names = [*CORE, *(name for extra in EXTRAS.values() for name in extra)]
    versions = {name: version_of(name) for name in names}
    problems = [f"{name} is missing: pip install clipkit" for name in CORE if versions[name] is None]
    problems += clashes(versions)
    notes = [
        f"[{extra}] isn't installed ({', '.join(missing)}): pip install 'clipkit[{extra}]'"
        for extra, packages in EXTRAS.items()
        if (missing := [name for name in packages if versions[name] is None])
    ]
    if find_spec("clipkit.pixels.jpeg_crop") is None:
        notes.append(
            "the decoder of JPEGs isn't compiled, so training reads images at half the speed: install a C compiler and "
            "then clipkit again"
        )
    if versions["pyspark"] and (lack := java_problem()):
        problems.append(lack)
    if versions["tensorflow"]:
        notes.append(
            "tensorflow is installed: clipkit never imports it in a process that trains, and neither should you"
        )
    device = find_device(problems)
    return Findings(platform.python_version(), versions, device, tuple(problems), tuple(notes))


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clashes(versions: dict[str, str | None]) -> list[str]:
    """Pairs of versions that are known not to work together."""
    found = []
    torch, vision, xla = versions["torch"], versions["torchvision"], versions["torch_xla"]
    wanted = required_torch()
    if torch and vision and wanted and not wanted.contains(torch, prereleases=True):
        found.append(f"torchvision {vision} needs torch {wanted}, but torch {torch} is here: install the pair together")
    if torch and xla and not same_release(torch, xla):
        found.append(f"torch_xla {xla} needs torch {xla}, but torch {torch} is here: use an environment of its own")
    tensorflow, tensorflow_io = versions["tensorflow"], version_of("tensorflow-io")
    if tensorflow and tensorflow_io and tuple(map(int, tensorflow.split(".")[:2])) >= (2, 17):
        found.append(
            f"tensorflow-io {tensorflow_io} doesn't load beside tensorflow {tensorflow}: remove it; clipkit reads and "
            "writes TFRecords without it"
        )
    return found


def required_torch() -> SpecifierSet | None:
    """The releases of torch that the installed torchvision asks for."""
    for line in importlib.metadata.requires("torchvision") or []:
        requirement = Requirement(line)
        if requirement.name == "torch":
            return requirement.specifier
    return None


def same_release(one: str, other: str) -> bool:
    """Whether two versions agree, apart from a local part such as `+cpu`."""
    return one.split("+")[0] == other.split("+")[0]


def find_device(problems: list[str]) -> str:
    """The device that `--device auto` takes, and why; a failure becomes a problem."""
    # In a process of its own, because a torchvision that doesn't fit ends the process without an exception.
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        problems.append("torchvision doesn't load beside this torch: install the pair together, from one index")
    try:
        from clipkit.device import pick

        device = pick("auto")
        return f"{device.kind} ({device.hardware()}): {device.why}"
    except UserError as error:
        problems.append(str(error))
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(f"torch doesn't load ({str(error).splitlines()[0]}): reinstall torch and torchvision together")
    return "none"


def print_findings(findings: Findings) -> None:
    """The findings as a table for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=f"clipkit on Python {findings.python}", title_justify="left")
    table.add_column("package")
    table.add_column("version")
    for name, version in findings.versions.items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    console.print(table)
    console.print(Text.assemble(("device  ", "bold"), findings.device))
    # Extras are in square brackets, which rich would take for its own markup.
    for note in findings.notes:
        console.print(Text.assemble(("note    ", "yellow"), note))
    for problem in findings.problems:
        console.print(Text.assemble(("problem ", "red"), problem))
    if not findings.problems:
        console.print("[green]no problems found[/green]")
