"""An exported folder as its reader sees it: what it says about itself, and its model, loaded as anybody would."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peftsearch.spec import StudyError, first_line, package_path
from peftsearch.spec.locations import PACKAGE_PREFIX

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftsearch.domains import Task
    from peftsearch.domains.tasks import Head

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
COMPLETE_CONFIG = "config.json"
LABELS = "labels.json"
"""The label names, in the order of the label ids. PEFT's configuration has no place for them, and a ``config.json``
beside ``adapter_config.json`` would make `transformers` look for a complete model in the folder."""
PROVENANCE = "provenance.json"
CARD = "README.md"


class HasTask(Protocol):
    """What loading needs to know of a domain."""

    @property
    def task(self) -> Task:
        """What the model does."""

    @property
    def head(self) -> Head:
        """The class of `transformers` that does it."""


@dataclass(frozen=True)
class ExportedFolder:
    """What an exported folder says about itself.

    Attributes:
        folder: Where it is.
        labels: Label names; their positions are the label ids.
        base: Folder or Hub id of the base model; None where the folder holds a complete model.
        revision: Hub revision of the base.
        pad_token_id: What the base has to be told about padding, where its own configuration is silent.
        quantization: Arguments of `transformers.BitsAndBytesConfig`, where the adapter was trained over a quantised
            base and belongs to it; None for the base as it is.
    """

    folder: Path
    labels: tuple[str, ...]
    base: str | None
    revision: str | None
    pad_token_id: int | None
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> ExportedFolder:
        """Read what stands in a folder; no weights are loaded.

        Raises:
            StudyError: There is no such folder, it was not written by ``peftsearch export``, or its base is gone.
        """
        if not os.path.isdir(folder):
            raise StudyError(f"no adapter folder {str(folder)!r}: check the path")
        adapter, complete = folder / ADAPTER_CONFIG, folder / COMPLETE_CONFIG
        if not adapter.is_file() and not complete.is_file():
            raise StudyError(
                f"{str(folder)!r} is no adapter: it holds neither {ADAPTER_CONFIG} nor {COMPLETE_CONFIG} "
                "(name one of the folders that 'peftsearch export' printed)"
            )
        if adapter.is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
            # PEFT would take a pickle beside it instead, or look for one on the Hub.
            raise StudyError(
                f"{str(folder)!r} holds no {ADAPTER_WEIGHTS}: export the trial again (no pickle is loaded)"
            )
        labels = _read_json(folder / LABELS)
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise StudyError(f"{str(folder / LABELS)!r} must be a list of label names: export the trial again")
        if not adapter.is_file():
            return cls(folder, tuple(labels), None, None, None)
        config = _read_object(adapter)
        model: Any = {}
        if (folder / PROVENANCE).is_file():
            model = _read_object(folder / PROVENANCE).get("model", {})
            if not isinstance(model, dict):
                raise StudyError(f"{str(folder / PROVENANCE)!r} is damaged: export the trial again")
        base = config.get("base_model_name_or_path")
        path = model.get("path", "")
        if isinstance(path, str) and path.startswith(PACKAGE_PREFIX):
            # The adapter's configuration holds the package's place on the machine that exported it.
            base = str(package_path(path))
        if not base or not isinstance(base, str):
            raise StudyError(f"{str(adapter)!r} names no base model (base_model_name_or_path): export the trial again")
        if (Path(base).is_absolute() or base.startswith("./")) and not Path(base).is_dir():
            # What was pushed says ./NAME of a base that was in a folder: no other model of the Hub is taken for it.
            raise StudyError(
                f"the base model {base!r} of the adapter {str(folder)!r} is not there: put it there, or write its "
                f"place as base_model_name_or_path into {ADAPTER_CONFIG}"
            )
        if base.startswith("./"):
            base = str(Path(base).resolve())
        return cls(
            folder, tuple(labels), base, config.get("revision"), model.get("pad_token_id"), model.get("quantization")
        )

    def load(self, domain: HasTask, device: torch.device, *, trust_remote_code: bool = False) -> nn.Module:
        """The model in evaluation mode, by `transformers` and `peft` alone: nothing of the study is used.

        Args:
            domain: Its task names the class of `transformers` that has the head.
            device: Where to put it.
            trust_remote_code: Whether a study file says that code which the base brings along may run; what stands in
                the folder itself is not asked.

        Raises:
            StudyError: A file is missing or damaged, or does not fit the base.
        """
        import transformers
        from peft import PeftModel

        from peftsearch.training.base_model import quiet_loading
        from peftsearch.training.quantised import settle

        auto = getattr(transformers, domain.head.auto_model)
        outputs = domain.task.config_kwargs(self.labels).get("num_labels")
        try:
            with quiet_loading():
                if self.base is None:
                    model = auto.from_pretrained(
                        str(self.folder), use_safetensors=True, trust_remote_code=trust_remote_code
                    )
                else:
                    base = auto.from_pretrained(
                        self.base,
                        revision=self.revision,
                        # A base that already classifies brings a head of its own size.
                        ignore_mismatched_sizes=True,
                        use_safetensors=True,
                        trust_remote_code=trust_remote_code,
                        **({"num_labels": outputs} if outputs else {}),
                        **self._quantised(device),
                    )
                    if self.quantization is not None:
                        settle(base)
                    if self.pad_token_id is not None:
                        base.config.pad_token_id = self.pad_token_id
                    model = PeftModel.from_pretrained(base, str(self.folder))
            # What bitsandbytes holds was loaded to where it computes.
            loaded: nn.Module = (model if self.quantization is not None else model.to(device)).eval()
        except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, ... by what is broken
            raise StudyError(f"cannot load the model in {str(self.folder)!r}: {first_line(error)}") from None
        return loaded

    def _quantised(self, device: torch.device) -> dict[str, Any]:
        if self.quantization is None:
            return {}
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**self.quantization), "device_map": {"": device}}


def scoring_device(gpus_per_worker: float) -> torch.device:
    """Where to score: on a GPU where the study trains on GPUs and this machine has one."""
    import torch

    return torch.device("cuda" if gpus_per_worker > 0 and torch.cuda.is_available() else "cpu")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(
            f"{str(path.parent)!r} holds no {path.name}: only folders written by 'peftsearch export' can be scored"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(f"cannot read {str(path)!r}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    if not isinstance(found, dict):
        raise StudyError(f"{str(path)!r} holds no JSON object: export the trial again")
    return found
