"""Secrets of a study that is served: who may rate, who may decide, and names for raters that say nothing."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from duet_jax.errors import StudyError


class Tokens:
    """Tokens that are the same after a restart, from one secret in the study's directory that only its owner can read.

    Args:
      folder: the study's directory.

    Raises:
      StudyError: the file serve.secret is damaged or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "serve.secret"
        try:
            # Whoever comes second reads what the first has made: the name appears with its content.
            made = folder / f".serve.secret.{secrets.token_hex(8)}.tmp"
            if not path.exists():
                descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32))
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(made, path)
                except FileExistsError:
                    pass
                finally:
                    made.unlink()
            self._secret = bytes.fromhex(path.read_text())
        except OSError as error:
            raise StudyError(f"{path} cannot be used: {error.strerror}.") from None
        except ValueError:
            self._secret = b""
        if len(self._secret) < 32:
            raise StudyError(f"{path} is damaged; delete it, and all tokens become new ones.")

    @property
    def owner(self) -> str:
        """Of whoever decides."""
        return self._derived("owner")

    @property
    def tester(self) -> str:
        """Of whoever rates."""
        return self._derived("tester")

    def trial(self, number: int) -> str:
        """Of programs that report ratings of one trial."""
        return self._derived(f"trial {number}")

    def rater(self, cookie: str) -> str:
        """A pseudonym, from which the cookie of its rater cannot be found."""
        return self._derived(f"rater {cookie}")[:12]

    def proof(self, cookie: str) -> str:
        """What a rater's cookie carries besides its value, so that nobody makes one up."""
        return self._derived(f"cookie {cookie}")

    def _derived(self, purpose: str) -> str:
        return hmac.new(self._secret, purpose.encode(), hashlib.sha256).hexdigest()[:40]


def same(one: str, other: str) -> bool:
    """Whether two tokens are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))
