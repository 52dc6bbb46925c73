"""Encodes statements of PTX for the engine: numbers of its instruction table, slots of registers."""

import re
from dataclasses import dataclass, field

from . import engine

SIZES = {kind + str(8 * size): size for kind in "bsuf" for size in (1, 2, 4, 8)}
STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)")  # negated, guard, mnemonic, operands
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
# Of loads and stores: what says nothing about which bytes they are.
HINTS = re.compile(r"relaxed|weak|volatile|nc|cta|gpu|sys|c[agsv]|wb|wt|L[12]::.*")


class Registers:
    """Slots of a warp's registers and of the constants, in units of 4 bytes a lane."""

    def __init__(self, declarations: dict[str, str]):
        special = engine.library().special_registers().decode().split()
        self.slots = {name: slot for slot, name in enumerate(special)}
        self.units = len(special)
        self.kinds = declarations  # "%rd": "b64"
        self.constants: dict[tuple[int, bool], int] = {}
        self.nowhere = self._new(8)

    def _new(self, width: int) -> int:
        slot, self.units = self.units, self.units + (2 if width == 8 else 1)
        return slot

    def letter(self, register: str) -> str:
        """p, 2, 4 or 8: as in the engine's table."""
        name = re.fullmatch(r"(%[a-z]+)\d+", register)
        if not name or name[1] not in self.kinds:
            raise ValueError(f"{register!r} is no register")
        kind = self.kinds[name[1]]
        return "p" if kind == "pred" else str(SIZES[kind])

    def slot(self, operand: str, letter: str = "4") -> int:
        """Of a register, or of a literal of so many bytes."""
        if operand == "_":
            return self.nowhere
        if not operand.startswith("%"):
            return self.constant(self.value(operand, letter), letter == "8")
        if operand not in self.slots:
            self.slots[operand] = self._new(8 if self.letter(operand) == "8" else 4)
        if self.is_wide(operand) != (letter == "8"):
            raise ValueError(f"{operand} where {letter} is expected")
        return self.slots[operand]

    def is_wide(self, operand: str) -> bool:
        return "." not in operand and self.letter(operand) == "8"

    def constant(self, value: int, wide: bool) -> int:
        key = value & (2**64 - 1 if wide else 2**32 - 1), wide
        if key not in self.constants:
            self.constants[key] = self._new(8 if wide else 4)
        return self.constants[key]

    @staticmethod
    def value(text: str, letter: str) -> int:
        if shared := re.fullmatch(r"global_smem(?:\+(\d+))?", text):
            return engine.library().shared_base() + int(shared[1] or 0)
        if text in ("true", "false"):
            return int(text == "true")
        if bits := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
            return int(bits[1], 16)
        value = int(text.rstrip("U"), 0)
        return bool(value) if letter == "p" else value & 0xFFFF if letter == "2" else value


class UnknownInstruction(Exception):
    """An instruction of PTX, or a form of one, that the engine does not have: a program with it is not run."""


@dataclass
class Encoded:
    """An instruction: its number in the engine's table, slots of registers, and what its form needs beside them."""

    operation: int
    results: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    fields: dict[str, int] = field(default_factory=dict)


class Encoder:
    """Knows the forms of instructions; a method for each that the engine's table does not describe by letters."""

    def __init__(self, registers: Registers, parameters: dict[str, int], labels: dict[str, int]):
        self.registers, self.parameters, self.labels = registers, parameters, labels
        self.table = engine.instructions()

    def statement(self, text: str) -> Encoded:
        matched = STATEMENT.fullmatch(text)
        if not matched:
            raise ValueError("no statement of PTX")
        negated, guard, mnemonic, operands = matched.groups()
        encoded = self.instruction(mnemonic, OPERAND.findall(operands))
        encoded.fields |= {"guard": self.registers.slot(guard, "p") if guard else -1, "negated": negated == "!"}
        return encoded

    def instruction(self, mnemonic: str, operands: list[str]) -> Encoded:
        form = mnemonic.split(".")[0]
        if form == "mov" and any("{" in operand for operand in operands):
            mnemonic = f"{'un' if '{' in operands[0] else ''}pack.b{mnemonic[-2:]}"
        if re.fullmatch(r"cvt\.[su]64\.[su]32", mnemonic) and self.registers.letter(operands[1]) == "8":
            mnemonic += "/b64"
        if self.table.get(mnemonic, (0, ""))[1]:
            return self.by_letters(mnemonic, operands)
        if mnemonic in self.table and not operands:
            return Encoded(self.number(mnemonic))
        for name in (mnemonic, form):
            if method := getattr(self, "_" + name.replace(".", "_"), None):
                return method(mnemonic, operands)
        raise UnknownInstruction(mnemonic)

    def number(self, name: str) -> int:
        if name not in self.table:
            raise UnknownInstruction(name)
        return self.table[name][0]

    def by_letters(self, mnemonic: str, operands: list[str]) -> Encoded:
        number, letters = self.table[mnemonic]
        results, _, sources = letters.partition("=")
        slots = self.slots([part for operand in operands for part in parts_of(operand)], results + sources)
        return Encoded(number, slots[: len(results)], slots[len(results) :])

    def slots(self, operands: list[str], letters: str) -> list[int]:
        return [self.registers.slot(*pair) for pair in zip(operands, letters, strict=True)]

    def address(self, operand: str, letter: str) -> tuple[int, int]:
        """The slot of the base, and the offset."""
        base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*\+?\s*(-?\d+)?\s*\]", operand).groups()
        return self.registers.slot(base, letter), int(offset or 0)

    # Memory -----------------------------------------------------------------------------------------------------------

    def _ld(self, mnemonic: str, operands: list[str]) -> Encoded:
        if mnemonic.startswith("ld.param."):
            return self._ld_param(mnemonic, operands)
        return self._access(mnemonic, operands[0], operands[1], results=True)

    def _st(self, mnemonic: str, operands: list[str]) -> Encoded:
        return self._access(mnemonic, operands[1], operands[0], results=False)

    def _ld_param(self, mnemonic: str, operands: list[str]) -> Encoded:
        kind, letter = mnemonic.split(".")[-1], self.registers.letter(operands[0])
        fields = {"offset": self.parameters[operands[1].strip("[] ")], "width": SIZES[kind], **cell(letter, kind)}
        return Encoded(self.number("ld.param"), [self.registers.slot(operands[0], letter)], [], fields)

    def _access(self, mnemonic: str, values: str, place: str, results: bool) -> Encoded:
        name, *modifiers, kind = mnemonic.split(".")
        space, count = self.space(mnemonic, modifiers)
        values = parts_of(values)
        if len(values) != count:
            raise ValueError(f"{len(values)} registers instead of {count}")
        letter = self.registers.letter(values[0]) if values[0].startswith("%") else str(max(SIZES[kind], 2))
        if (letter == "8") != (SIZES[kind] == 8) and not results:
            raise ValueError(f"{kind} from a register of {letter} bytes")
        slots = self.slots(values, letter * count)
        base, offset = self.address(place, "4" if space == "shared" else "8")
        fields = {"count": count, "width": SIZES[kind], "shared": space == "shared", "offset": offset}
        fields |= cell(letter, kind)
        return Encoded(self.number(name), slots if results else [], [base] if results else [*slots, base], fields)

    @staticmethod
    def space(mnemonic: str, modifiers: list[str]) -> tuple[str, int]:
        """Where an access goes, and how many elements it has."""
        space, count = "", 1
        for modifier in modifiers:
            if modifier in ("global", "shared", "shared::cta"):
                space = modifier.removesuffix("::cta")
            elif modifier in ("v2", "v4"):
                count = int(modifier[1])
            elif not HINTS.fullmatch(modifier):
                raise UnknownInstruction(mnemonic)
        if not space:
            raise UnknownInstruction(mnemonic)
        return space, count

    def _red(self, mnemonic: str, operands: list[str]) -> Encoded:
        name, *modifiers, function, kind = mnemonic.split(".")
        space, _ = self.space(mnemonic, modifiers)
        *results, place, value = operands
        letter = str(SIZES[kind])
        base, offset = self.address(place, "4" if space == "shared" else "8")
        slots = self.slots([*results, *parts_of(value)], letter * (len(results) + 1))
        fields = {"width": SIZES[kind], "shared": space == "shared", "offset": offset}
        number = self.number(f"{name}.{function}.{kind}")
        return Encoded(number, slots[: len(results)], [*slots[len(results) :], base], fields)

    _atom = _red

    def _matrix(self, mnemonic: str, values: str, place: str) -> Encoded:
        shape = re.fullmatch(r"\w+\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", mnemonic)
        if not shape:
            raise UnknownInstruction(mnemonic)
        name, count = mnemonic.split(".")[0], int(shape[1])
        if name == "stmatrix" and shape[2]:
            raise UnknownInstruction(mnemonic)
        slots = self.slots(parts_of(values), "4" * count)
        base, offset = self.address(place, "4")
        fields = {"count": count, "option": bool(shape[2]), "offset": offset}
        loads = name == "ldmatrix"
        return Encoded(self.number(name), slots if loads else [], [base] if loads else [*slots, base], fields)

    def _ldmatrix(self, mnemonic: str, operands: list[str]) -> Encoded:
        return self._matrix(mnemonic, *operands)

    def _stmatrix(self, mnemonic: str, operands: list[str]) -> Encoded:
        return self._matrix(mnemonic, *reversed(operands))

    # What is waited for ----------------------------------------------------------------------------------------------

    def _cp(self, mnemonic: str, operands: list[str]) -> Encoded:
        if not re.fullmatch(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L\d::.*)?", mnemonic):
            raise UnknownInstruction(mnemonic)
        size = int(operands[2], 0)
        if size not in (4, 8, 16):
            raise ValueError(f"a copy of {size} bytes")
        to, to_offset = self.address(operands[0], "4")
        source, offset = self.address(operands[1], "8")
        copied = self.registers.slot(operands[3] if len(operands) > 3 else operands[2])
        fields = {"width": size, "offset": offset, "other_offset": to_offset}
        return Encoded(self.number("cp.async"), [], [to, source, copied], fields)

    def _wait(self, mnemonic: str, operands: list[str]) -> Encoded:
        return Encoded(self.number(mnemonic), [], [], {"offset": int(operands[0], 0)})

    _cp_async_wait_group = _wgmma_wait_group_sync_aligned = _wait

    def _wgmma(self, mnemonic: str, operands: list[str]) -> Encoded:
        shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2", mnemonic)
        if not shape:
            raise UnknownInstruction(mnemonic)
        d, a, b, adds, scale_a, scale_b, *transposed = operands
        if (scale_a, scale_b, *set(transposed)) != ("1", "1", "0"):
            raise UnknownInstruction(f"{mnemonic} with negated or transposed operands")
        columns = int(shape[1])
        results = self.slots(parts_of(d), "4" * (columns // 2))
        a_slots = self.slots(parts_of(a), "4444" if "{" in a else "8")
        sources = [*a_slots, self.registers.slot(b, "8"), self.registers.slot(adds, "p")]
        return Encoded(self.number(f"wgmma.{shape[2]}"), results, sources, {"count": columns, "option": "{" in a})

    # Flow ------------------------------------------------------------------------------------------------------------

    def _bra(self, mnemonic: str, operands: list[str]) -> Encoded:
        return Encoded(self.number(mnemonic), fields={"offset": self.labels[operands[0]]})

    def _bar_sync(self, mnemonic: str, operands: list[str]) -> Encoded:
        if operands != ["0"]:
            raise UnknownInstruction(f"{mnemonic} of another barrier than 0, or of some of the warps")
        return Encoded(self.number(mnemonic))

    _barrier_sync = _bar_sync


def cell(letter: str, kind: str) -> dict[str, int]:
    return {"cell": 8 if letter == "8" else 4, "is_signed": kind[0] == "s"}


def parts_of(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]
