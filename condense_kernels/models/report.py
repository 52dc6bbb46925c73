"""What apply_condense did, for handle.report() and print."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    model: str  # its class
    method: str
    scores: str  # which attention, and how it was got
    features: str  # where they were condensed
    images: tuple[tuple[int, int], ...] = ()  # N, K of each image of the last call, or of each of its crops
    encoder_ms: float | None = None  # the encoder with scores, and with operator where that comes before the projector
    scores_ms: float | None = None
    operator_ms: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.method}", f"scores    {self.scores}", f"features  {self.features}"]
        if self.encoder_ms is None:
            return "\n".join([*lines, "no call with images so far"])
        images = ", ".join(f"{n} -> {k}" for n, k in self.images[:8]) + (", ..." if len(self.images) > 8 else "")
        times = f"encoder {self.encoder_ms:.1f} ms, scores {self.scores_ms:.2f} ms, operator {self.operator_ms:.2f} ms"
        return "\n".join([*lines, f"images    {images}", f"times     {times}"])
