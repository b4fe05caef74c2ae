"""Build everything that a release consists of, below dist/.

    python3 .packaging/build.py              all of it (make dist)
    python3 .packaging/build.py wheel        only these parts: wheel, chart, packages, sbom

The packages (.deb, .rpm) carry an interpreter of their own under /opt/virtbus, so that the host's Python does not
matter: CPython compiled from Debian 12's source package, which has Debian's security fixes. OpenSSL, SQLite and libvirt
stay the host's, so that its updates reach us. Compiled on Debian 12 with libm's `hypot` bound to its old version
(portable.h), nothing needs more than glibc 2.34 and libvirt 9.0: Debian 12, Ubuntu 24.04, RHEL 9 and later.

Every file's time is that of the commit (SOURCE_DATE_EPOCH), so that two builds of it can be compared.
"""

from __future__ import annotations

import ast
import compileall
import contextlib
import gzip
import hashlib
import io
import json
import os
import pprint
import py_compile
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "build" / "packages"
CACHE = ROOT / ".cache" / "packages"
DIST = ROOT / "dist"
NFPM = "github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.2"
PYTHON = "python3.11"
# The newest glibc that the packages may ask for: RHEL 9's.
GLIBC = (2, 34)
# What of the standard library no part of virtbus imports.
UNUSED = (
    "test",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "distutils/command",
)
UNUSED_MODULES = (
    "_tkinter",
    "_curses",
    "_curses_panel",
    "readline",
    "_dbm",
    "_gdbm",
    "nis",
    "_crypt",
    "_bz2",
    "_testcapi",
)

# How the interpreter is compiled, in `{tree}`, its source.
CFLAGS = "-O2 -g0 -fstack-protector-strong -D_FORTIFY_SOURCE=2 -include portable.h -ffile-prefix-map={tree}=."
LDFLAGS = "-Wl,-z,relro,-z,now"
CONFIGURE = ("--prefix=/opt/virtbus", "--without-ensurepip", "--disable-test-modules", "--with-system-expat")
# As Debian does: a fix of theirs makes this module use what only the interpreter's own parts may.
SETUP = "*static*\npyexpat pyexpat.c -lexpat\n"


class BuildError(Exception):
    """What failed and what to do, in one line."""


def main(parts: Sequence[str]) -> int:
    """Build the named parts, all without a name; returns the exit code."""
    builders = {"wheel": wheel, "chart": chart, "packages": packages, "sbom": sbom}
    unknown = [part for part in parts if part not in builders]
    try:
        if unknown:
            raise BuildError(f"no such part: {', '.join(unknown)}; there are {', '.join(builders)}")
        os.environ.setdefault("SOURCE_DATE_EPOCH", epoch())
        os.environ["PYTHONHASHSEED"] = "0"
        DIST.mkdir(exist_ok=True)
        for part in parts or builders:
            builders[part]()
        checksums()
    except BuildError as error:
        print(f"dist: {error}", file=sys.stderr)
        return 1
    return 0


# ------------------------------------------------------------------------------------------------ small parts


def version() -> str:
    """The one place that names it is virtbus/__init__.py."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "virtbus/__init__.py").read_text(), re.MULTILINE)
    if not found:
        raise BuildError("virtbus/__init__.py names no __version__")
    return found[1]


def epoch() -> str:
    """The time of the commit, in seconds since 1970; outside a repository that of the newest source file."""
    if (ROOT / ".git").exists():
        # In a container the checkout may be another user's, which git would refuse.
        command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode:
            raise BuildError(f"the commit's time, which all files get, can't be read: {asked.stderr.strip()}")
        return asked.stdout.strip()
    return str(int(max(file.stat().st_mtime for file in (ROOT / "virtbus").rglob("*.py"))))


def run(*command: str | Path, cwd: Path = ROOT, **extra: str) -> None:
    """Run a command; its output goes to build/packages/log, and its end is shown when it fails."""
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "log"
    with log.open("a", encoding="utf-8") as out:
        print(f"+ {' '.join(map(str, command))}", file=out, flush=True)
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=os.environ | extra,
            stdout=out,
            stderr=out,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise BuildError(f"{command[0]} ended with {done.returncode}; the whole log is {log}\n{tail}")


def checksums() -> None:
    """SHA256SUMS of what lies in dist/, as sha256sum reads it."""
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(DIST.iterdir())
        if file.is_file() and file.name != "SHA256SUMS"
    ]
    (DIST / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    print(f"dist/: {len(lines)} files and SHA256SUMS")


@contextlib.contextmanager
def fresh(pattern: str) -> Iterator[None]:
    """Remove what an earlier build left of these files."""
    for old in DIST.glob(pattern):
        old.unlink()
    yield


def environment(name: str, lock: Path) -> Path:
    """The programs of a virtual environment with what `lock` pins by hash; made once for the lock's content."""
    folder = WORK / f"{name}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:8]}"
    if not (folder / "installed").exists():
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(folder / "bin/pip", "install", "--quiet", "--require-hashes", "--requirement", lock)
        (folder / "installed").touch()
    return folder / "bin"


def tool_pip() -> Path:
    """The pip of the pinned build tools, which installs into other interpreters too."""
    return environment("tool", ROOT / ".docker" / "build.txt") / "pip"


# -------------------------------------------------------------------------------------------- wheel and chart


def wheel() -> None:
    """Sdist and wheel, by hatchling, which honours SOURCE_DATE_EPOCH."""
    hatchling = tool_pip().with_name("hatchling")
    with fresh("*.whl"), fresh("*.tar.gz"):
        run(hatchling, "build", "--directory", DIST)


def chart() -> None:
    """The chart's archive: what `helm package` makes, with the commit's time in it."""
    helm = os.environ.get("HELM") or shutil.which("helm")
    if helm is None:
        raise BuildError("the chart needs helm on PATH, or HELM=/path/to/helm")
    folder = WORK / "chart"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run(
        helm,
        "package",
        "charts/virtbus",
        "--version",
        version(),
        "--app-version",
        version(),
        "--destination",
        folder,
    )
    made = next(folder.glob("*.tgz"))
    with fresh("virtbus-*.tgz"):
        (DIST / made.name).write_bytes(same_bytes(made))


def same_bytes(archive: Path) -> bytes:
    """A .tgz with its members sorted, and owner and time that depend on the commit alone."""
    moment = int(os.environ["SOURCE_DATE_EPOCH"])
    plain = io.BytesIO()
    with (
        tarfile.open(archive) as source,
        tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as out,
    ):
        for member in sorted(source.getmembers(), key=lambda each: each.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = moment, 0, 0, "", ""
            member.pax_headers = {}
            out.addfile(member, source.extractfile(member) if member.isfile() else None)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=moment, filename="") as file:
        file.write(plain.getvalue())
    return packed.getvalue()


# ---------------------------------------------------------------------------------------------- the packages


def packages() -> None:
    """The .deb and the .rpm, from one tree below build/packages/root."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    if release.get("VERSION_CODENAME") != "bookworm":
        raise BuildError(
            "the packages are built on Debian 12 (its glibc runs everywhere); use a debian:12 container"
        )
    opt = interpreter()
    install(opt)
    check_glibc(opt)
    extras(opt)
    nfpm = CACHE / "nfpm"
    if not nfpm.exists():
        if shutil.which("go") is None:
            raise BuildError("nfpm is built with Go; install Go 1.24 or newer (Debian 12's own is too old)")
        run("go", "install", NFPM, GOBIN=str(CACHE))
    for kind in ("deb", "rpm"):
        with fresh(f"*.{kind}"):
            run(
                nfpm, "package", "--packager", kind, "--config", HERE / "nfpm.yaml", "--target", DIST,
                cwd=WORK, VERSION=version(), ARCH=architecture(),
            )  # fmt: skip


def architecture() -> str:
    """The machine's, by Go's names, which nfpm maps to those of each package format."""
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    return names[os.uname().machine]


def debian_sources() -> list[str]:
    """Options by which apt-get reads the source packages of the host's own archives; the host's lists stay as they are."""
    apt = WORK / "apt"
    parts, lists = apt / "sources.list.d", apt / "lists"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    etc = Path("/etc/apt")
    for file in (etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))):
        if file.suffix in (".list", ".sources") and file.exists():
            text = re.sub(r"^Types: .*$", "Types: deb-src", file.read_text(), flags=re.MULTILINE)
            text = re.sub(r"^deb(-src)? ", "deb-src ", text, flags=re.MULTILINE)
            (parts / file.name).write_text(text)
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": parts,
        "Dir::State::lists": lists,
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", *words, "update", "-qq")
    return words


def source_package() -> Path:
    """The newest source package of the interpreter that the archive hands out: its .dsc, the rest beside it."""
    options = debian_sources()
    shown = subprocess.run(
        ["apt-cache", *options, "showsrc", PYTHON], capture_output=True, text=True, check=True
    ).stdout
    versions = sorted(
        re.findall(r"^Version: (\S+)$", shown, re.MULTILINE), key=lambda each: re.split(r"(\d+)", each)
    )
    for number, each in enumerate(reversed(versions)):
        folder = CACHE / "sources" / each
        found = folder / f"{PYTHON}_{each.partition(':')[2] or each}.dsc"
        if not found.exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                run("apt-get", *options, "source", "--download-only", "-qq", f"{PYTHON}={each}", cwd=folder)
            except BuildError as error:
                print(
                    f"dist: warning: {PYTHON} {each} can't be downloaded; trying an older one",
                    file=sys.stderr,
                )
                if number + 1 == len(versions):
                    raise BuildError(f"no source package of {PYTHON} can be downloaded") from error
                continue
        return found
    raise BuildError(f"apt names no source package of {PYTHON}; is there a Debian archive in /etc/apt?")


def interpreter() -> Path:
    """CPython below build/packages/root/opt/virtbus; compiled once for a version of Debian's source, then copied.

    Neither the commit nor the folder of the first build shows in it: later ones, elsewhere too, get the same bytes.
    """
    dsc = source_package()
    recipe = repr((CFLAGS, LDFLAGS, CONFIGURE, SETUP, (HERE / "portable.h").read_text()))
    built = CACHE / f"{dsc.stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not built.exists():
        print(f"compiling {dsc.stem} (some minutes)")
        tree = CACHE.resolve() / "source"
        shutil.rmtree(tree, ignore_errors=True)
        run("dpkg-source", "--no-check", "-x", dsc, tree)
        (tree / "Modules/Setup.local").write_text(SETUP, encoding="utf-8")
        shutil.copy(HERE / "portable.h", tree)
        run("./configure", *CONFIGURE, cwd=tree, CFLAGS=CFLAGS.format(tree=tree), LDFLAGS=LDFLAGS)
        # `sys.version` shows the time of the build.
        moment = subprocess.run(
            ["dpkg-parsechangelog", "--show-field", "Timestamp"],
            cwd=tree, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        run("make", f"-j{os.cpu_count()}", cwd=tree, SOURCE_DATE_EPOCH=moment)
        staged = built.with_suffix(".new")
        shutil.rmtree(staged, ignore_errors=True)
        run("make", "install", f"DESTDIR={staged}", cwd=tree, SOURCE_DATE_EPOCH=moment)
        for file in (staged / "opt/virtbus/lib" / PYTHON).glob("_sysconfigdata_*.py"):
            if not file.is_symlink():
                without_folder(file, str(tree))
        staged.rename(built)
        shutil.rmtree(tree)
    root = WORK / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(built, root, symlinks=True)
    opt = root / "opt" / "virtbus"
    library = opt / "lib" / PYTHON
    for name in UNUSED:
        shutil.rmtree(library / name, ignore_errors=True)
    for name in UNUSED_MODULES:
        for file in (library / "lib-dynload").glob(f"{name}.*.so"):
            file.unlink()
    for name in ("share", "include"):
        shutil.rmtree(opt / name, ignore_errors=True)
    for leftover in (opt / "lib").glob("*.a"):
        leftover.unlink()
    shutil.rmtree(opt / "lib" / "pkgconfig", ignore_errors=True)
    for config in library.glob("config-*"):
        shutil.rmtree(config)
    return opt


def without_folder(file: Path, folder: str) -> None:
    """Write sysconfig's table again, as CPython does, with `.` for the folder that it was compiled in."""
    found = ast.literal_eval(file.read_text(encoding="utf-8").partition("build_time_vars = ")[2])
    table = {
        name: value.replace(folder, ".") if isinstance(value, str) else value for name, value in found.items()
    }
    file.write_text(f"build_time_vars = {pprint.pformat(table)}\n", encoding="utf-8")


def install(opt: Path) -> None:
    """Virtbus and its pinned dependencies into the interpreter's own site-packages; every file's hash is checked."""
    python, pip, wheels = opt / "bin" / PYTHON, tool_pip(), WORK / "wheels"
    wheel()
    lock = ROOT / ".docker" / "requirements-agent.txt"
    wheels.mkdir(parents=True, exist_ok=True)
    run(
        pip,
        "wheel",
        "--quiet",
        "--wheel-dir",
        wheels,
        "--require-hashes",
        "--no-build-isolation",
        "--requirement",
        lock,
        # What is compiled here lies in a folder of a random name: without it in the file the bytes are the same.
        CFLAGS="-g0",
    )
    run(
        pip, "--python", python, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--find-links", wheels,
        "--requirement", unhashed(lock), DIST / f"virtbus-{version()}-py3-none-any.whl",
        DEB_PYTHON_INSTALL_LAYOUT="deb",  # as one of Debian's packages: lib/python3/dist-packages, not local/
    )  # fmt: skip
    for file in (opt / "bin").iterdir():
        if file.name != PYTHON:
            file.unlink()
    (opt / "bin" / "python").symlink_to(PYTHON)
    launcher = opt / "bin" / "virtbus"
    # -I: neither the caller's PYTHON* variables nor his folder decide what a daemon imports.
    launcher.write_text(
        "#!/opt/virtbus/bin/python -I\nimport sys\n\nfrom virtbus.__main__ import main\n\nsys.exit(main())\n",
        encoding="utf-8",
    )
    launcher.chmod(0o755)
    site = opt / "lib" / "python3" / "dist-packages"
    for note in (
        *site.glob("*.dist-info/direct_url.json"),
        *site.glob("*.dist-info/INSTALLER"),
        *site.glob("*.dist-info/REQUESTED"),
    ):
        note.unlink()
    for record in site.glob("*.dist-info/RECORD"):
        record.unlink()  # names what was left out here; dpkg and rpm keep their own list
    shared = [file for file in opt.rglob("*.so*") if file.is_file() and not file.is_symlink()]
    run("strip", "--strip-unneeded", *shared, python)
    for cache in list(opt.rglob("__pycache__")):
        shutil.rmtree(cache)
    compileall.compile_dir(
        opt / "lib", stripdir=opt.parents[1], prependdir="/", quiet=1, workers=1, legacy=False,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )  # fmt: skip


def unhashed(lock: Path) -> Path:
    """The lock's names and versions alone: pip refuses hashes beside a wheel that was built here."""
    names = [
        line.split(" ")[0] for line in lock.read_text().splitlines() if re.match(r"[a-z0-9][^ ]*==", line)
    ]
    out = WORK / "names.txt"
    out.write_text("\n".join(names) + "\n", encoding="utf-8")
    return out


def check_glibc(opt: Path) -> None:
    """Raise BuildError when a file asks for a newer glibc than we promise, or for a library that hosts may lack."""
    too_new: dict[str, str] = {}
    for file in [opt / "bin" / PYTHON, *opt.rglob("*.so*")]:
        if file.is_symlink() or not file.is_file():
            continue
        told = subprocess.run(["objdump", "-T", file], capture_output=True, text=True, check=True).stdout
        for found in re.findall(r"\(?GLIBC_(\d+)\.(\d+)", told):
            if tuple(map(int, found)) > GLIBC:
                too_new[str(file.relative_to(opt))] = ".".join(found)
    if too_new:
        raise BuildError(f"newer than glibc {GLIBC[0]}.{GLIBC[1]}: {too_new}")


def extras(opt: Path) -> None:
    """Unit, manual pages, completion and configuration, written by the very program that is packaged."""
    virtbus = [str(opt / "bin" / PYTHON), "-I", "-c"]
    out = WORK / "extras"
    shutil.rmtree(out, ignore_errors=True)
    (out / "man").mkdir(parents=True)
    shutil.copytree(HERE / "scripts", out / "scripts")
    for file in (HERE / "virtbus.sysusers", HERE / "virtbus.toml", ROOT / "LICENSE", ROOT / "CHANGELOG.md"):
        shutil.copy(file, out)

    def say(code: str) -> str:
        # The staged interpreter finds itself by its own place; nothing of the host is used.
        return subprocess.run(
            [*virtbus, code], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"}
        ).stdout

    (out / "virtbus.service").write_text(
        say("import sys; from virtbus.commands.host import unit; unit(sys.stdout, user='virtbus', command='/usr/bin/virtbus', "
            "drain_seconds=10, packaged=True)"),
        encoding="utf-8",
    )  # fmt: skip
    completion = subprocess.run(
        [opt / "bin" / PYTHON, "-I", "-c", "from virtbus.cli import cli; cli(prog_name='virtbus')"],
        capture_output=True, text=True, check=False,  # click ends with 1 after it has printed the script
        env={"PATH": "/usr/bin:/bin", "_VIRTBUS_COMPLETE": "bash_source"},
    )  # fmt: skip
    if "_virtbus_completion" not in completion.stdout:
        raise BuildError(f"no completion script: {completion.stderr.strip()}")
    (out / "virtbus.bash").write_text(completion.stdout, encoding="utf-8")
    run(opt / "bin" / PYTHON, "-I", HERE / "manual.py", out / "man", version())


# ------------------------------------------------------------------------------------------------------ sbom


def sbom() -> None:
    """A CycloneDX bill of materials of the packages' tree."""
    opt = WORK / "root" / "opt" / "virtbus"
    if not (opt / "bin" / "virtbus").exists():
        packages()
    tool = environment("cyclonedx", HERE / "sbom.txt") / "cyclonedx-py"
    target = DIST / f"virtbus-{version()}.cdx.json"
    run(
        tool, "environment", opt / "bin" / PYTHON, "--pyproject", "pyproject.toml",
        "--output-reproducible", "--output-file", target,
    )  # fmt: skip
    bill = json.loads(target.read_text(encoding="utf-8"))
    source = source_package().stem.partition("_")
    bill["components"].append(
        {
            "type": "application",
            "name": "cpython",
            "version": source[2],
            "purl": f"pkg:deb/debian/{PYTHON}@{source[2]}?arch=source",
        }
    )
    target.write_text(json.dumps(bill, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
