"""What a study file may say, and the shape of a trial: the words that all other parts share."""

from peftsearch.spec.errors import StudyError, UnreachableError
from peftsearch.spec.facts import THREADS, Baseline, Direction, DomainFacts, ModelFacts, StudyFacts
from peftsearch.spec.locations import model_location, package_path
from peftsearch.spec.secrets import hide_secrets, note_secrets, without_passwords
from peftsearch.spec.space import Range, Scalar, Space
from peftsearch.spec.study import (
    ColumnsSpec,
    ConfirmSpec,
    DataSpec,
    DomainSpec,
    ExpectedSpec,
    ForgettingSpec,
    LimitSpec,
    MethodSpec,
    ModelSpec,
    ResourcesSpec,
    SearchSpec,
    SplitSpec,
    StudySpec,
    TrackingSpec,
    TrainingSpec,
    check_name,
)
from peftsearch.spec.study_file import StudyFile, problem, suggest
from peftsearch.spec.trial import Confirmed, Reading, Rung, TrialRecord, TrialState

__all__ = [
    "THREADS",
    "Baseline",
    "ColumnsSpec",
    "ConfirmSpec",
    "Confirmed",
    "DataSpec",
    "Direction",
    "DomainFacts",
    "DomainSpec",
    "ExpectedSpec",
    "ForgettingSpec",
    "LimitSpec",
    "MethodSpec",
    "ModelFacts",
    "ModelSpec",
    "Range",
    "Reading",
    "ResourcesSpec",
    "Rung",
    "Scalar",
    "SearchSpec",
    "Space",
    "SplitSpec",
    "StudyError",
    "StudyFacts",
    "StudyFile",
    "StudySpec",
    "TrackingSpec",
    "TrainingSpec",
    "TrialRecord",
    "TrialState",
    "UnreachableError",
    "check_name",
    "hide_secrets",
    "model_location",
    "note_secrets",
    "package_path",
    "problem",
    "suggest",
    "without_passwords",
]
