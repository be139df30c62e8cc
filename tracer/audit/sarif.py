"""An audit in SARIF 2.1.0, for programs that collect the findings of many checkers.

Source: OASIS, Static Analysis Results Interchange Format (SARIF) Version 2.1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.findings import Audit, Finding

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def to_sarif(audit: Audit, *, uri: str) -> Mapping[str, Any]:
    """Return the audit as a SARIF log; `uri` is where the subject lies."""
    used = sorted({finding.check for finding in audit.findings})
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "truedag audit",
                        "version": version("truedag"),
                        "rules": [_rule(check) for check in used],
                    }
                },
                "results": [_result(finding, used.index(finding.check), uri) for finding in audit.findings],
            }
        ],
    }


def _rule(name: str) -> Mapping[str, Any]:
    check = CHECKS[name]
    return {
        "id": name,
        "shortDescription": {"text": check.title},
        "fullDescription": {"text": check.meaning},
        "help": {"text": f"{check.decision} {check.fix}"},
        "defaultConfiguration": {"level": check.severity},
    }


def _result(finding: Finding, rule: int, uri: str) -> Mapping[str, Any]:
    return {
        "ruleId": finding.check,
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {
            "text": f"{finding.title}. Expected: {finding.expected}. Found: {finding.found}. Required: {finding.fix}"
        },
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": uri}},
                "logicalLocations": [{"fullyQualifiedName": node, "kind": "node"} for node in finding.nodes],
            }
        ],
        "properties": {"ranks": list(finding.ranks), "layers": list(finding.layers), "follows": finding.follows},
    }
