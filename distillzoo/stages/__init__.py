"""Find a network's stages and what its classifier reads: declared, from a table, timm's ``feature_info``, or a dry run."""

from distillzoo.stages.activations import complete_stage, is_activation
from distillzoo.stages.classifier import classifier_input
from distillzoo.stages.dry_run import Call, DryRun, tensor_of
from distillzoo.stages.finders import declared_stages, find_stages, resolve_stages
from distillzoo.stages.layouts import View, as_view
from distillzoo.stages.probe import Probe, split_path

__all__ = [
    "Call",
    "DryRun",
    "Probe",
    "View",
    "as_view",
    "classifier_input",
    "complete_stage",
    "declared_stages",
    "find_stages",
    "is_activation",
    "resolve_stages",
    "split_path",
    "tensor_of",
]
