"""P2, P3: the public names are listed, sorted and real, and importing them costs torch alone."""

from __future__ import annotations

import subprocess
import sys

import dreamrie
from tests.contracts.sources import ROOT

EXPECTED = {"LoraPair", "Riemannion", "attach_lora", "locally_optimal_init", "lora_pairs"}
HEAVY = ("peft", "diffusers", "transformers", "accelerate", "gradio", "PIL", "pydantic", "yaml")
LIMIT_S = 3.0


def test_the_list_of_public_names_is_sorted_and_complete() -> None:
    """P2: `__all__` holds every public name once, in order."""
    assert list(dreamrie.__all__) == sorted(set(dreamrie.__all__))
    assert set(dreamrie.__all__) >= EXPECTED


def test_each_public_name_resolves_and_is_documented() -> None:
    """P2: a listed name exists, is visible to dir(), and says what it is for."""
    for name in dreamrie.__all__:
        value = getattr(dreamrie, name)
        assert name in dir(dreamrie)
        if callable(value):
            assert (value.__doc__ or "").strip(), name


def test_importing_dreamrie_loads_torch_and_nothing_heavier() -> None:
    """P3: in a fresh interpreter, also after the torch-only names have been touched."""
    program = f"""
import sys, time
import torch
started = time.process_time()
import dreamrie
dreamrie.Riemannion, dreamrie.locally_optimal_init
spent = time.process_time() - started
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print(spent)
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < LIMIT_S
