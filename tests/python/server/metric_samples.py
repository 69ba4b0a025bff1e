"""Reads what /metrics answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Samples:
    """The samples of a page by name; `kinds` are the types of the families."""

    kinds: dict[str, str] = field(default_factory=dict)
    by_name: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)

    @classmethod
    def parse(cls, page: str) -> Samples:
        samples = cls()
        for family in text_string_to_metric_families(page):
            samples.kinds[family.name] = family.type
            for sample in family.samples:
                samples.by_name.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
        return samples

    def all(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """The samples of this name with these labels, among others."""
        return [
            (found, value) for found, value in self.by_name.get(name, []) if labels.items() <= found.items()
        ]

    def one(self, name: str, **labels: str) -> float:
        [(_, value)] = self.all(name, **labels)
        return value
