"""metrics.jsonl and evaluations to one self-contained HTML page."""

from moe.report.run import write_report

__all__ = ["write_report"]
