"""Names to paths: the only code of the app that joins, resolves or opens paths made from what a user says.

    root/users/<owner>/<kind>/<name>/...     what people keep
    root/incoming/...                        where the page puts uploads

Three rules hold for every path, each of them enough against most attacks: names are made of a few safe characters; no
link is followed anywhere below `root`; and the path, resolved, lies inside the folder it must lie in. No message holds
a path, or a name that was refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from app import names as naming
from app import places, receiving
from app.names import StorageError
from dreamrie.files import write_atomic

__all__ = ["KINDS", "MOST_FOLDERS", "Kind", "Owner", "Storage", "StorageError"]

Kind = Literal["photos", "runs", "uploads", "pictures"]
KINDS: tuple[str, ...] = get_args(Kind)
# A folder holds a training or a picture; more than this is no use by a person.
MOST_FOLDERS = 2000
_OWNER = re.compile(r"[0-9a-f]{32}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{16,200}")
_LOGIN = "user:"
_ABANDONED_S = 3600.0
_REMOVED = ".removed-"
_BROWSER_FILE = "browser-secret"


@dataclass(frozen=True)
class Owner:
    """Somebody with folders of their own.

    Attributes:
        id: 32 hexadecimal digits, from a secret that only this person's browser has, or from a login.
    """

    id: str


class Storage:
    """Folders of people below one root; several threads may use it.

    Args:
        root: made if missing.
        max_bytes_per_owner: what one owner's files may take together.

    Attributes:
        root: without links.
        incoming: where the page puts uploads.
    """

    def __init__(self, root: Path, *, max_bytes_per_owner: int = 2 << 30) -> None:
        self.root = Path(places.real(root))
        self.incoming = self.root / "incoming"
        self._users = self.root / "users"
        self._max_bytes = max_bytes_per_owner
        self._lock = threading.RLock()
        with places.in_words("the storage cannot be opened"):
            for folder in (self.root, self.incoming, self._users):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                places.refuse_links(folder)
        self._sweep(_ABANDONED_S)

    def owner(self, key: str) -> Owner:
        """Who somebody is.

        Args:
            key: secret of a browser, 16 to 200 of A-Z a-z 0-9 _ -; or "user:" and the name of a login, which only the
                server may put there: what a browser says must not begin with it.

        Returns:
            Always the same for the same key.

        Raises:
            StorageError: the key could be guessed or is none.
        """
        if not isinstance(key, str):
            raise StorageError("who you are could not be told. Reload the page.")
        login = key.removeprefix(_LOGIN) if key.startswith(_LOGIN) else None
        good = login.isprintable() and 0 < len(login) <= 200 if login is not None else False
        if not good and not _SECRET.fullmatch(key):
            raise StorageError("who you are could not be told. Reload the page, or log in again.")
        return Owner(hashlib.sha256(key.encode()).hexdigest()[:32])

    def owners(self) -> list[Owner]:
        """Everybody with folders here; for the server itself, which starts anew, and for no page.

        Returns:
            By id.
        """
        return [Owner(id) for id in sorted(os.listdir(self._users)) if _OWNER.fullmatch(id)]

    def browser_secret(self) -> str:
        """What browsers encrypt their key with; the same after a restart, or every browser would lose its work.

        Returns:
            32 letters and digits.
        """
        path = self.root / _BROWSER_FILE
        with self._lock, places.in_words("the storage cannot be opened"):
            if not path.is_file():
                write_atomic(path, secrets.token_hex(16).encode())
                path.chmod(0o600)
            return path.read_text("ascii")

    def names(self, owner: Owner, kind: Kind) -> list[str]:
        """Folders of an owner.

        Args:
            owner: whose.
            kind: what they hold.

        Returns:
            Names, the one made last first.
        """
        home = self._home(owner, kind)
        made: list[tuple[int, str]] = []
        with places.in_words("your files cannot be listed"):
            if not home.is_dir():
                return []
            for entry in os.scandir(home):
                if entry.is_dir(follow_symlinks=False) and naming.is_folder_name(entry.name):
                    made.append((-_made_at(home / entry.name), entry.name))
        return [name for _, name in sorted(made)]

    def create(self, owner: Owner, kind: Kind, title: str) -> str:
        """Make an empty folder.

        Args:
            owner: whose.
            kind: what it is for.
            title: any text; the name shows what of it is safe.

        Returns:
            Its name, 1 to 40 of a-z 0-9 -, which no other folder of this owner and kind has.

        Raises:
            StorageError: there are too many folders, or the space of the owner or of the disk is used up.
        """
        home, stem = self._home(owner, kind), naming.slug(title, kind)
        with self._lock, places.in_words("the folder cannot be made"):
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if len(self.names(owner, kind)) >= MOST_FOLDERS:
                raise StorageError(f"you have {MOST_FOLDERS} {kind} already. Remove some first.")
            self._check_space(owner, 0)
            return next(name for name in naming.numbered(stem) if _make(home / name))

    def folder(self, owner: Owner, kind: Kind, name: str) -> Path:
        """A folder that exists.

        Args:
            owner: whose.
            kind: what it holds.
            name: as `create` returned it.

        Returns:
            Its path, without links.

        Raises:
            StorageError: there is none of this name, as far as this owner can know.
        """
        home = self._home(owner, kind)
        if not naming.is_folder_name(name):
            raise StorageError(f"this is no name of {kind}.")
        path = home / name
        if not places.is_inside(path, home) or not path.is_dir():
            raise StorageError(f"you have no {kind} named {name}.")
        return path

    def file(self, owner: Owner, kind: Kind, name: str, *inside: str) -> Path:
        """A path inside a folder that exists.

        Args:
            owner: whose.
            kind: of the folder.
            name: of the folder.
            inside: folders and name of a file, which need not exist.

        Returns:
            The path, without links.

        Raises:
            StorageError: there is no such folder, a part is no safe name, a link is on the way, or a file is there
                whose name differs in the case of letters alone.
        """
        folder = self.folder(owner, kind, name)
        path = folder
        for part in inside:
            if not naming.is_file_name(part):
                raise StorageError(f"this is no name of a file in {name}.")
            if places.has_twin(path, part):
                raise StorageError(f"{part} differs from another file only in capital letters.")
            path /= part
            if not places.is_inside(path, folder):
                raise StorageError(f"{part} is not a file of your own.")
        return path

    def remove(self, owner: Owner, kind: Kind, name: str) -> None:
        """Remove a folder and all that is in it.

        Args:
            owner: whose.
            kind: what it holds.
            name: of the folder.

        Raises:
            StorageError: there is none, or it cannot be removed.
        """
        with self._lock, places.in_words(f"{kind} could not be removed"):
            path = self.folder(owner, kind, name)
            # Under another name first: nobody sees a folder that is half gone. Links in it are removed, not followed.
            gone = path.with_name(f"{_REMOVED}{secrets.token_hex(8)}")
            path.rename(gone)
            _marker(path).unlink(missing_ok=True)
            shutil.rmtree(gone)

    def used(self, owner: Owner) -> int:
        """Bytes of all files of an owner.

        Args:
            owner: whose.

        Returns:
            Their sum.
        """
        home = self._home(owner, "runs").parent
        return sum(size for _, size in places.files_below(home))

    def receive(
        self,
        owner: Owner,
        kind: Kind,
        name: str,
        uploads: Sequence[str],
        *,
        max_bytes: int,
        max_files: int,
        suffixes: frozenset[str],
    ) -> list[str]:
        """Copy files that the page has put into `incoming`; all of them, or none.

        What a file holds is not looked at, but for programs, which are refused; who opens it must not trust its suffix.

        Args:
            owner: whose.
            kind: of the folder.
            name: of the folder.
            uploads: paths as the page gives them.
            max_bytes: what the folder may hold afterwards.
            max_files: likewise.
            suffixes: allowed ones, such as ".png", in small letters.

        Returns:
            Their names in the folder: safe, and different from each other and from those there, also on systems that
            do not tell a from A. What was named alike but for the suffix stays so.

        Raises:
            StorageError: a file is not an upload, of a wrong kind, or too much; the folder is as it was.
        """
        with self._lock, places.in_words("the files could not be kept"):
            folder = self.folder(owner, kind, name)
            if isinstance(uploads, str) or not isinstance(uploads, Sequence) or not uploads:
                raise StorageError("no file was given.")
            before = list(places.files_below(folder))
            receiving.check_number(len(before), len(uploads), max_files)
            for upload in uploads:
                if not self._is_upload(upload):
                    raise StorageError("one of the files was not uploaded here. Upload it again.")
            sizes = [receiving.check(Path(upload), suffixes) for upload in uploads]
            receiving.check_bytes(sum(size for _, size in before), sum(sizes), max_bytes)
            self._check_space(owner, sum(sizes))
            taken = [path.name for path, _ in before if path.parent == folder]
            names = naming.unique_names([Path(upload).name for upload in uploads], taken)
            pairs = zip(map(Path, uploads), names, sizes, strict=True)
            receiving.copy_all(list(pairs), folder)
            return names

    def delete_abandoned(self, older_than_s: float) -> int:
        """Delete uploads that nobody has taken.

        Args:
            older_than_s: age in seconds from which on a file is abandoned.

        Returns:
            How many files were deleted.

        Raises:
            StorageError: the age is no number of seconds, or they cannot be deleted.
        """
        if not older_than_s >= 0:
            raise StorageError("an age is a number of seconds, not below 0.")
        limit, count = time.time() - older_than_s, 0
        with places.in_words("old uploads cannot be deleted"):
            places.refuse_links(self.incoming)
            for place, folders, files in os.walk(self.incoming, topdown=False):
                for file in (*files, *folders):
                    path = Path(place, file)
                    about = path.lstat()
                    if about.st_mtime > limit:
                        continue
                    if not stat.S_ISDIR(about.st_mode):
                        path.unlink(missing_ok=True)
                        count += 1
                    elif not any(path.iterdir()):
                        path.rmdir()
        return count

    def _home(self, owner: Owner, kind: Kind) -> Path:
        """Folder of an owner's folders; it may not exist yet."""
        if not isinstance(owner, Owner) or not isinstance(owner.id, str):
            raise StorageError("who you are could not be told. Reload the page.")
        if not _OWNER.fullmatch(owner.id):
            raise StorageError("who you are could not be told. Reload the page.")
        if not isinstance(kind, str) or kind not in KINDS:
            raise StorageError(f"there are only {', '.join(KINDS)}.")
        path = self._users / owner.id / kind
        places.refuse_links(path)
        return path

    def _is_upload(self, upload: str) -> bool:
        """Whether a path is that of a file in `incoming`, with no link on the way."""
        if not isinstance(upload, str) or not 0 < len(upload) <= 4096 or "\0" in upload:
            return False
        path = Path(upload)
        return (
            path.is_absolute() and ".." not in path.parts and places.is_inside(path, self.incoming)
        )

    def _check_space(self, owner: Owner, more: int) -> None:
        """Refuse what goes beyond the quota."""
        used = self.used(owner)
        if used + more > self._max_bytes or used >= self._max_bytes:
            raise StorageError(
                f"your files would take {(used + more) / 1e6:.1f} MB, and {self._max_bytes / 1e6:.1f} MB are allowed. "
                "Remove some first."
            )

    def _sweep(self, older_than_s: float) -> None:
        """Remove what a crash left half made; never the work of a moment ago, which may go on."""
        limit = time.time() - older_than_s
        for home in sorted(self._users.glob("*/*")):
            if places.real(home) != str(home) or not home.is_dir():
                continue
            for path in home.iterdir():
                if (
                    path.name.startswith((receiving.STAGING, _REMOVED))
                    and path.lstat().st_mtime < limit
                ):
                    shutil.rmtree(path, ignore_errors=True)


def _marker(folder: Path) -> Path:
    """File whose time says when a folder was made."""
    return folder.with_name(f".made-{folder.name}")


def _make(folder: Path) -> bool:
    """Make a folder and note when; False if something has this name."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    # Beside the folder, whose own time changes with what is written into it.
    marker, now = _marker(folder), time.time_ns()
    marker.touch(mode=0o600)
    os.utime(marker, ns=(now, now))
    return True


def _made_at(folder: Path) -> int:
    """Nanoseconds; after a crash between folder and marker, when the folder last changed."""
    for path in (_marker(folder), folder):
        try:
            return path.lstat().st_mtime_ns
        except FileNotFoundError:
            continue
    return 0
