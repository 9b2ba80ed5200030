"""What an engine has done, in numbers."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
        decode_steps: passes that gave running answers a token each.
        decoded_tokens: tokens of answers that these passes made.
        decode_rows: slots that went through these passes, gaps included.
        busy_steps, busy_tokens: the same while requests were waiting, that is before the drain.
        busy_slots: slots that there were in the busy steps.
        prefill_tokens: prompt tokens that went through the text model.
        encoded_requests: requests whose pictures were encoded.
        spared_encodings: of these, such as showed the same as another that was encoded with them.
        encode_seconds, prefill_seconds, decode_seconds: time of each kind of work.
        constrained_tokens: that grammars had a say in, those of prompts' ends included.
        constrain_seconds: time that grammars took on the host; a GPU works on the step meanwhile.
        most_running: most answers under way at once.
    """

    decode_steps: int = 0
    decoded_tokens: int = 0
    decode_rows: int = 0
    busy_steps: int = 0
    busy_tokens: int = 0
    busy_slots: int = 0
    prefill_tokens: int = 0
    encoded_requests: int = 0
    spared_encodings: int = 0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    constrained_tokens: int = 0
    constrain_seconds: float = 0.0
    most_running: int = 0

    def occupancy(self, slot_count: int | None = None) -> float | None:
        """Return the share of slots that were writing while requests waited; None when none ever did.

        Args:
            slot_count: how many there might have been; None: those that there were.
        """
        slots = self.busy_slots if slot_count is None else self.busy_steps * slot_count
        return self.busy_tokens / slots if slots else None
