"""Import first: `dreamrie` without torch, for processes of tests that only speak the protocol of the real ones.

`import dreamrie` loads torch, which takes seconds; its modules for errors and files do not need it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

_bare = ModuleType("dreamrie")
_bare.__path__ = [str(Path(__file__).resolve().parents[2] / "dreamrie")]
sys.modules["dreamrie"] = _bare
