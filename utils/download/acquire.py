"""Coming by a data set: what is missing is fetched and unpacked, by the first plan that works out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from utils.download.archives import bytes_to_unpack, unpack
from utils.download.ledger import Ledger
from utils.download.sources import Archive, File, Target
from utils.download.space import readable, require_space
from utils.download.transfer import FetchError, Patience, Wanted, fetch, size_of

HEAD_TIMEOUT = 10.0  # seconds; an address that is silent for longer is not asked for a size


@dataclass(frozen=True)
class Means:
    """How to fetch.

    Attributes:
        root: the folder of the data set.
        mirror: an address tried before all others, '' for none.
        keep: whether archives stay once they are unpacked.
        patience: with servers.
    """

    root: Path
    mirror: str
    keep: bool
    patience: Patience


@dataclass(frozen=True)
class State:
    """How far a file is.

    Attributes:
        done: nothing is left to do.
        there: it lies there whole (an archive: and is to be unpacked).
        part: bytes that a stopped download left.
        size: of the whole, in bytes.
        known: whether a server or a digest vouches for `size`; otherwise it is an estimate.
        unpacks: bytes that unpacking adds; as many as `size` until the archive is there, as photographs and
            PNGs are compressed already.
    """

    done: bool
    there: bool
    part: int
    size: int
    known: bool
    unpacks: int


def addresses(file: File, mirror: str) -> tuple[str, ...]:
    """Where to try, in this order."""
    first = (f"{mirror.rstrip('/')}/{quote(file.name)}",) if mirror and file.addresses else ()
    return (*first, *file.addresses)


def state_of(file: File, ledger: Ledger, *, means: Means, ask: bool) -> State:
    """How far a file is; with `ask`, servers are asked for its size."""
    path, unpacks = means.root / file.name, 0
    there = path.is_file()
    done = ledger.has_unpacked(file) if isinstance(file, Archive) else there
    if done or there:
        if isinstance(file, Archive) and not done:
            unpacks = bytes_to_unpack(path, means.root / file.into, wanted=file.wanted)
        return State(done, there, 0, path.stat().st_size if there else file.size, there, unpacks)
    unfinished = path.with_name(f"{path.name}.part")
    part = unfinished.stat().st_size if unfinished.is_file() else 0
    timeout = min(HEAD_TIMEOUT, means.patience.timeout)
    found = (size_of(address, timeout=timeout) for address in addresses(file, means.mirror) if ask)
    size = next((size for size in found if size is not None), None)
    unpacks = (size or file.size) if isinstance(file, Archive) else 0
    return State(False, False, part, size or file.size, bool(size or file.sha256), unpacks)


def space_needed(files: tuple[File, ...], states: tuple[State, ...], *, keep: bool) -> int:
    """Bytes needed at the worst moment, when an archive and what it unpacks to lie side by side."""
    used = worst = 0
    for file, state in zip(files, states, strict=True):
        if state.done:
            continue
        used += state.unpacks + (0 if state.there else max(0, state.size - state.part))
        worst = max(worst, used)
        if isinstance(file, Archive) and not keep:
            used -= state.size
    return worst


def in_order(target: Target, root: Path) -> list[tuple[File, ...]]:
    """The plans; one whose files were put there by hand comes first."""
    return sorted(target.plans, key=lambda plan: not all((root / file.name).is_file() for file in plan))


def acquire(target: Target, means: Means) -> None:
    """Fetches and unpacks what is missing.

    Raises:
        FetchError: no plan works out; every address and why.
        UserError: too little space, or an archive that is damaged or refused.
    """
    ledger, reasons = Ledger(means.root), []
    plans = in_order(target, means.root)
    for number, plan in enumerate(plans, start=1):
        try:
            _carry_out(plan, ledger, means=means)
            return
        except FetchError as error:
            reasons += error.mistakes
            if number < len(plans):
                rest = ", ".join(file.name for file in plans[number])
                print(f"{error}\ngoing on with the published archive: {rest}", flush=True)
    missing = [[file.name for file in plan if not _is_here(file, ledger, means.root)] for plan in plans]
    ways = " or ".join(", ".join(names) for names in missing)
    hint = (
        f"run this again, which goes on where it was, or before that fetch by hand into {means.root}: {ways}"
    )
    raise FetchError([*reasons, hint], "fetching: no address gave the file")


def pending(target: Target, root: Path) -> list[Archive]:
    """The archives that lie there and have not been unpacked."""
    ledger = Ledger(root)
    archives = [file for plan in target.plans for file in plan if isinstance(file, Archive)]
    return [each for each in archives if (root / each.name).is_file() and not ledger.has_unpacked(each)]


def unpack_archives(archives: list[Archive], means: Means) -> None:
    """Unpacks archives that lie there; fetches nothing.

    Raises:
        UserError: too little space, or an archive that is damaged or refused.
    """
    ledger = Ledger(means.root)
    for archive in archives:
        _unpack(archive, ledger, means=means)


def _is_here(file: File, ledger: Ledger, root: Path) -> bool:
    unpacked = isinstance(file, Archive) and ledger.has_unpacked(file)
    return unpacked or (root / file.name).is_file()


def _carry_out(plan: tuple[File, ...], ledger: Ledger, *, means: Means) -> None:
    states = tuple(
        state_of(file, ledger, means=means, ask=isinstance(file, Archive) and bool(file.addresses))
        for file in plan
    )
    require_space(means.root, space_needed(plan, states, keep=means.keep), "the data set, unpacked,")
    for file, state in zip(plan, states, strict=True):
        if state.done:
            print(f"{file.name}: done already")
            continue
        if not state.there:
            if not file.addresses:
                continue  # one that a person has to fetch
            _fetch(file, ledger, means=means)
        if isinstance(file, Archive):
            _unpack(file, ledger, means=means)


def _fetch(file: File, ledger: Ledger, *, means: Means) -> None:
    path = means.root / file.name
    sources = addresses(file, means.mirror)
    print(f"{file.name}: from {sources[0]}", flush=True)
    size = file.size if file.sha256 else None
    wanted = Wanted(file.begins, size, file.sha256)
    fetched = fetch(sources, path, wanted=wanted, patience=means.patience)
    ledger.add_file(file.name, fetched)
    print(f"{file.name}: {readable(fetched.size)}, SHA-256 {fetched.sha256}", flush=True)


def _unpack(archive: Archive, ledger: Ledger, *, means: Means) -> None:
    path = means.root / archive.name
    unpacked = unpack(path, means.root / archive.into, wanted=archive.wanted)
    ledger.add_unpacked(archive, unpacked)
    already = f", {unpacked.skipped:,} of them there already" if unpacked.skipped else ""
    print(
        f"{archive.name}: unpacked {unpacked.files:,} files{already}, {readable(unpacked.size)}", flush=True
    )
    if not means.keep:
        path.unlink()
        print(f"{archive.name}: removed, as it is unpacked (--keep-archives keeps it)", flush=True)


def describe(target: Target, means: Means) -> list[str]:
    """What `acquire` would do, one line each; only sizes are asked for, nothing is written."""
    ledger, lines = Ledger(means.root), []
    for number, plan in enumerate(in_order(target, means.root)):
        lines.append("would fetch:" if number == 0 else "and only if that fails, instead:")
        states = tuple(state_of(file, ledger, means=means, ask=True) for file in plan)
        for file, state in zip(plan, states, strict=True):
            lines += [f"  {line}" for line in _description(file, state, means=means)]
        need = space_needed(plan, states, keep=means.keep)
        lines.append(f"  space needed at the worst moment, unpacked included: about {readable(need)}")
    return lines


def _description(file: File, state: State, *, means: Means) -> list[str]:
    if state.done:
        return [f"{file.name}: done already"]
    size = readable(state.size) if state.known else f"about {readable(state.size)} (an estimate)"
    lines = [f"{file.name}: {size}" + (", there already" if state.there else "")]
    if state.part:
        lines[0] += f", of which {readable(state.part)} are there"
    if not state.there:
        lines += [f"  from {address}" for address in addresses(file, means.mirror)]
        lines += [] if file.addresses else ["  to be fetched by hand"]
    if isinstance(file, Archive):
        what = ", ".join(file.wanted) or "all of it"
        lines.append(f"  unpacks {what} into {means.root / file.into}")
    return lines
