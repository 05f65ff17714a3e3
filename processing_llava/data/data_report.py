"""What a check of training data found: numbers, and every record that was refused, by reason."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .record_files import RefusedRecord
from .row_lengths import FITS, MeasuredRow

PERCENTILES = (50, 90, 99, 100)

ANY = "any"
_NUM_IDS = 5


@dataclass(frozen=True)
class Refusal:
    """One record, or one question of it, that cannot be used."""

    source: str
    id: str
    reason: str
    message: str


@dataclass
class CheckReport:
    """What is known of records so far; of usable ones only numbers."""

    num_records: int = 0
    num_cut: int = 0
    """Usable records whose first turn is one of the assistant, which is left out."""
    spelled: Counter = field(default_factory=Counter)
    """For each special token how many usable records spell it in characters; "any" counts records."""
    num_supervised: int = 0
    """Tokens that are learned."""
    lengths: array = field(default_factory=lambda: array("L"))
    """Tokens of each usable row, images counted."""
    fates: Counter = field(default_factory=Counter)
    """How many usable rows fit, are too long but kept, and are parts."""
    refusals: list[Refusal] = field(default_factory=list)

    def count(self, rows: Iterable[MeasuredRow], refused: Iterable[RefusedRecord], *, source: str) -> None:
        """Counts one record in: the rows that it gives, and what cannot be used of it."""
        self.num_records += 1
        for measured in rows:
            self.lengths.append(measured.num_tokens)
            self.num_supervised += measured.num_supervised
            self.fates[measured.fate] += 1
        self.refusals += [Refusal(source, error.record_id, error.reason, str(error)) for error in refused]

    def add(self, other: "CheckReport") -> None:
        """Counts in what is known of other records."""
        self.num_records += other.num_records
        self.num_cut += other.num_cut
        self.spelled += other.spelled
        self.num_supervised += other.num_supervised
        self.lengths += other.lengths
        self.fates += other.fates
        self.refusals += other.refusals

    def _format_spelled(self) -> str:
        names = [name for name, _ in self.spelled.most_common() if name != ANY]
        tokens = ", ".join(f"{name} {self.spelled[name]:,}" for name in names[:_NUM_IDS])
        return (
            f"{self.spelled[ANY]:,}: {tokens}{', ...' if len(names) > _NUM_IDS else ''} (--learn-token, for answers)"
        )

    def percentiles(self) -> dict[int, int]:
        """For each of `PERCENTILES` the length in tokens that so many rows do not exceed."""
        if not self.lengths:
            return {}
        lengths = np.percentile(np.asarray(self.lengths), PERCENTILES, method="higher")
        return dict(zip(PERCENTILES, map(int, lengths)))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "records": self.num_records,
            "usable_rows": len(self.lengths),
            "first_turns_left_out": self.num_cut,
            "spelled_special_tokens": dict(self.spelled),
            "fates": dict(self.fates),
            "tokens": sum(self.lengths),
            "supervised_tokens": self.num_supervised,
            "length_percentiles": self.percentiles(),
            "refused": [asdict(refusal) for refusal in self.refusals],
        }

    def format_table(self) -> str:
        """What people read: totals, then for each reason a few ids and the first message."""
        num_tokens = sum(self.lengths)
        share = f" ({self.num_supervised / num_tokens:.1%})" if num_tokens else ""
        spread = ", ".join(f"{length:,} ({percent}%)" for percent, length in self.percentiles().items())
        cells = {
            "records": f"{self.num_records:,}",
            "usable rows": f"{len(self.lengths):,}",
            **{f"  {fate}": f"{count:,}" for fate, count in self.fates.items() if fate != FITS},
            **({"  first turn left out": f"{self.num_cut:,}"} if self.num_cut else {}),
            **({"  spell tokens": self._format_spelled()} if self.spelled else {}),
            "tokens": f"{num_tokens:,}",
            "supervised tokens": f"{self.num_supervised:,}{share}",
            "tokens a row, up to": spread or "-",
            "refused": f"{len(self.refusals):,}",
        }
        lines = [f"{name:22}{value}" for name, value in cells.items()]
        for reason, count in Counter(refusal.reason for refusal in self.refusals).most_common():
            same = [refusal for refusal in self.refusals if refusal.reason == reason]
            ids = ", ".join(refusal.id for refusal in same[:_NUM_IDS]) + (", ..." if count > _NUM_IDS else "")
            lines += [f"  {reason:19} {count:,}: {ids}", f"    {same[0].message}"]
        return "\n".join(lines)
