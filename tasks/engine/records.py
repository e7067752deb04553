"""Where Prefect keeps the results of cached tasks: atomic files that are checked when read."""

import hashlib
from pathlib import Path

from prefect.filesystems import LocalFileSystem
from prefect.results import ResultRecord  # pyright: ignore[reportPrivateImportUsage]

from memit.errors import IntegrityError
from memit.files.atomic import write_whole
from tasks.engine.artifacts import artifacts_in, cache_directory
from tasks.engine.checkpoints import forget_work
from tasks.engine.store import shared_store


class Records(LocalFileSystem):
    """The records in `.cache/records/`, each under its key and after its own SHA-256. Where there
    is one, the checkpoints of its task are deleted.

    Where reading a record fails, for whatever reason, Prefect computes its piece again.
    """

    _block_type_name = "Checked Records"

    def _resolve_path(self, path: str) -> Path:
        return cache_directory() / "records" / Path(path).name

    def read_path(self, path: str, _sync: bool = True) -> bytes:
        """What was written under this key, here or by another machine.

        Raises:
            IntegrityError: it is damaged or another key's, or a file that it names is.
        """
        file, store = self._resolve_path(path), shared_store()
        if store is not None and not file.exists():
            write_whole(file, lambda partial: store.get(f"records/{file.name}", partial))
        checksum, _, content = file.read_bytes().partition(b"\n")
        if _checksum(content) != checksum:
            raise IntegrityError(f"{file} is damaged: delete it and run again.")
        record = ResultRecord.deserialize(content)
        is_own = Path(record.metadata.storage_key or "").name == file.name
        if not (is_own and all(artifact.intact() for artifact in artifacts_in(record.result))):
            raise IntegrityError(f"{file} is another piece's, or files that it names are damaged.")
        forget_work(file.name)  # of a process that was killed after it had written the record
        return content

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> str:
        """Write a record, and put it into the shared store.

        Raises:
            ResourceError: the disk is full.
            UnreachableError: the store cannot be written.
        """
        file, store = self._resolve_path(path), shared_store()
        write_whole(file, lambda partial: partial.write_bytes(_checksum(content) + b"\n" + content))
        if store is not None:
            store.put(file, f"records/{file.name}")
        forget_work(file.name)
        return str(file)


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
