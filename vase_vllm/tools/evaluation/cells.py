"""What has been measured, on disk: one file for each method and sample."""

import json
import os
import re
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vase_vllm.tools.evaluation.fingerprint import digest
from vase_vllm.tools.evaluation.methods import Method
from vase_vllm.tools.evaluation.samples import Sample
from vase_vllm.tools.evaluation.scores import Scores


class CellStore:
    """Scores in files that know what they are of.

    A file of another model, text or setting is not read: its cell counts as not measured.

    Args:
        directory: where the files are; it is made when the first one is written.
        common: everything but method and sample that the scores depend on, as JSON can hold it.
    """

    def __init__(self, directory: Path, common: dict[str, object]) -> None:
        self.directory = directory
        self._common = common

    def load(self, method: Method, sample: Sample) -> Scores | None:
        """The scores of a cell, or None if it is not measured."""
        try:
            with np.load(self._path(method, sample)) as arrays:
                if str(arrays["fingerprint"]) != self._fingerprint(method, sample):
                    return None
                return Scores(arrays["token_ids"], arrays["logprobs"], arrays["ranks"])
        except (FileNotFoundError, BadZipFile, KeyError):
            return None

    def is_outdated(self, method: Method, sample: Sample) -> bool:
        """Whether there is a file, of another model, text or setting."""
        return self._path(method, sample).exists() and self.load(method, sample) is None

    def save(self, method: Method, sample: Sample, scores: Scores) -> None:
        """Write the scores of a cell, complete or not at all."""
        path = self._path(method, sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez_compressed(
                file, fingerprint=np.array(self._fingerprint(method, sample)), **vars(scores)
            )
        os.replace(unfinished, path)

    def _path(self, method: Method, sample: Sample) -> Path:
        name = re.sub(r"[^\w.=-]+", "-", sample.name)
        return self.directory / method.directory_name / f"{name}.npz"

    def _fingerprint(self, method: Method, sample: Sample) -> str:
        cell = {
            "common": self._common,
            "eviction": method.config and [method.config.policy.name, str(method.config)],
            "sample": sample.sha256,
            "top_logprobs": sample.top_logprobs,
        }
        return digest(json.dumps(cell, sort_keys=True).encode())
