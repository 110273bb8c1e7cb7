"""What can be wrong with a checkpoint: each kind of fault with its weight, what comes of it, and what to do.

Owns the kinds and the words that hold for every program. What one server makes of a fault is `readings.py`; how a
fault is found is `checks/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Severity(str, Enum):
    """ERROR: some program refuses the checkpoint or computes another model from it. NOTE: nothing is wrong."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Kind(str, Enum):
    NOT_A_CHECKPOINT = "not-a-checkpoint"
    UNREADABLE_FILE = "unreadable-file"
    BAD_CONFIG = "bad-config"
    NO_CONFIG = "no-config"
    ODD_CONFIG = "odd-config"
    MISSING_SHARD = "missing-shard"
    WRONG_SHARD = "wrong-shard"
    NOT_IN_INDEX = "not-in-index"
    DUPLICATE_TENSOR = "duplicate-tensor"
    UNREAD_FILE = "unread-file"
    FOREIGN_FORMAT = "foreign-format"
    NO_READER = "no-reader"
    INCOMPLETE_WEIGHT = "incomplete-weight"
    MISSING_TENSOR = "missing-tensor"
    MISSING_EXPERT = "missing-expert"
    POORER_LAYER = "poorer-layer"
    UNKNOWN_TENSOR = "unknown-tensor"
    STORED_TWICE = "stored-twice"
    WRONG_DTYPE = "wrong-dtype"
    WRONG_SHAPE = "wrong-shape"
    TRANSPOSED_EXPERTS = "transposed-experts"
    MISNAMED_EXPERTS = "misnamed-experts"
    LOST_EXPERTS = "lost-experts"
    BLOCK_LENGTH = "block-length"
    NAN_BLOCK_SCALE = "nan-block-scale"
    ZERO_BLOCK_SCALE = "zero-block-scale"
    NEGATIVE_BLOCK_SCALE = "negative-block-scale"
    OVERFLOWING_BLOCK = "overflowing-block"
    VANISHING_BLOCK = "vanishing-block"
    BAD_TENSOR_SCALE = "bad-tensor-scale"
    SUBNORMAL_SCALE = "subnormal-scale"
    BAD_INPUT_SCALE = "bad-input-scale"
    NONFINITE_VALUES = "nonfinite-values"
    ALL_ZERO = "all-zero"
    BAD_KV_SCALE = "bad-kv-scale"
    MISSING_KV_SCALE = "missing-kv-scale"
    TENSOR_SCALES_DIFFER = "tensor-scales-differ"
    INPUT_SCALES_DIFFER = "input-scales-differ"
    SET_IN_PART = "set-in-part"
    MISSING_INPUT_SCALE = "missing-input-scale"
    QUANTISED_BUT_IGNORED = "quantised-but-ignored"
    DENSE_BUT_NOT_IGNORED = "dense-but-not-ignored"
    DENSE_EXPERTS = "dense-experts"
    TIED_HEAD_DIFFERS = "tied-head-differs"
    NO_QUANT_CONFIG = "no-quant-config"
    CLAIM_WITHOUT_CODES = "claim-without-codes"
    ALGORITHM_DIFFERS = "algorithm-differs"
    WRONG_ALGORITHM = "wrong-algorithm"
    GROUP_SIZE_MISSING = "group-size-missing"
    GROUP_SIZE_NESTED = "group-size-nested"
    GROUP_SIZE_NESTED_ONLY = "group-size-nested-only"
    GROUP_SIZE_DIFFERS = "group-size-differs"
    GROUP_SIZE_WRONG = "group-size-wrong"
    IGNORE_LISTS_DIFFER = "ignore-lists-differ"
    KV_CACHE_DIFFERS = "kv-cache-differs"
    NESTED_ONLY = "nested-only"
    NESTED_WEIGHT_ONLY = "nested-weight-only"
    WILL_NOT_LOAD = "will-not-load"
    NOT_AS_SOURCE = "not-as-source"
    SOURCE_MISMATCH = "source-mismatch"
    HINTS_DAMAGED = "hints-damaged"


@dataclass(frozen=True)
class About:
    """`consequence`: what comes of it in programs of which nothing more is known. `remedy`: what to do next.

    SRC and FORMAT in a remedy stand for the checkpoint's name and format.
    """

    severity: Severity
    consequence: str
    remedy: str


_DOWNLOAD = "download or export the checkpoint again"
_EXPORT = "export it again, or convert it anew from the checkpoint that it was quantised from"
_REWRITE = "write the configs anew: fp4conv convert SRC DST --to FORMAT (codes stay as they are)"
_BOTH_FORMS = "have it said in both forms: fp4conv convert SRC DST --to nvfp4"
_RANDOM = "servers refuse to load, or compute with whatever their memory held"
_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE

ABOUT: Mapping[Kind, About] = {
    Kind.NOT_A_CHECKPOINT: About(_E, "no program can load it as a model", "give the folder of a model"),
    Kind.UNREADABLE_FILE: About(_E, "no program can open it, and its tensors are missing", "download this file again"),
    Kind.BAD_CONFIG: About(_E, "no program can tell what model this is", "download this file again"),
    Kind.NO_CONFIG: About(_E, "no program can tell what model this is", "copy config.json from the original model"),
    Kind.ODD_CONFIG: About(
        _E, "programs that read it as its format says stop at it", "mend it, or take the file of the original model"
    ),
    Kind.MISSING_SHARD: About(_E, "its tensors are missing", "download the missing files"),
    Kind.WRONG_SHARD: About(_E, "programs that go by the index do not find it", _DOWNLOAD),
    Kind.NOT_IN_INDEX: About(
        _E, "programs that go by the index never see these tensors", "download the index again, or write it anew"
    ),
    Kind.DUPLICATE_TENSOR: About(
        _E, "which of the two is used depends on the order of files", "move the shards that do not belong away"
    ),
    Kind.UNREAD_FILE: About(_W, "programs that read every file of the folder take it along", "move it away"),
    Kind.FOREIGN_FORMAT: About(
        _E, "fp4conv does not know this format, so nothing of it was checked", "verify the checkpoint it was made from"
    ),
    Kind.NO_READER: About(
        _E,
        "no server has a reader for it",
        "convert it: fp4conv convert SRC DST --to mxfp4",
    ),
    Kind.INCOMPLETE_WEIGHT: About(_E, _RANDOM, _DOWNLOAD),
    Kind.MISSING_TENSOR: About(_E, _RANDOM, _DOWNLOAD),
    Kind.MISSING_EXPERT: About(_E, _RANDOM, _DOWNLOAD),
    Kind.POORER_LAYER: About(_W, f"if it belongs there, {_RANDOM}", "compare with the original model"),
    Kind.UNKNOWN_TENSOR: About(_W, "programs stop at it or leave it out, without a word", "find out where it is from"),
    Kind.STORED_TWICE: About(
        _E,
        "programs take one of the two and leave the other out, without a word",
        "find out which is meant, and export it",
    ),
    Kind.WRONG_DTYPE: About(_E, "its bytes mean something else than its name says", _EXPORT),
    Kind.WRONG_SHAPE: About(_E, "servers refuse to load it", "take the config.json that belongs to these weights"),
    Kind.TRANSPOSED_EXPERTS: About(_E, "servers refuse to load it, or multiply by the wrong matrix", _EXPORT),
    Kind.MISNAMED_EXPERTS: About(
        _E,
        "programs look for these experts under other names and do not find them",
        "mend the names: fp4conv convert SRC DST --to bf16",
    ),
    Kind.LOST_EXPERTS: About(
        _E, "the experts of all other layers are lost; programs fill them with random values", _EXPORT
    ),
    Kind.BLOCK_LENGTH: About(
        _E, "servers' kernels take blocks of 16", "halve the blocks, without loss: fp4conv convert SRC DST --to nvfp4"
    ),
    Kind.NAN_BLOCK_SCALE: About(_E, "every value of the block is NaN, and soon every output", _EXPORT),
    Kind.ZERO_BLOCK_SCALE: About(_E, "the block reads as zeros, though its codes are not", _EXPORT),
    Kind.NEGATIVE_BLOCK_SCALE: About(
        _E, "hardware takes block scales for unsigned, programs that decode take the sign", _EXPORT
    ),
    Kind.OVERFLOWING_BLOCK: About(_E, "values decode to infinity", _EXPORT),
    Kind.VANISHING_BLOCK: About(_E, "values that are not zero decode to zero", _EXPORT),
    Kind.BAD_TENSOR_SCALE: About(_E, "every value of the tensor is lost", _EXPORT),
    Kind.SUBNORMAL_SCALE: About(
        _W, "GPUs that take subnormal numbers for zero lose every value that is scaled by it", _EXPORT
    ),
    Kind.BAD_INPUT_SCALE: About(_E, "the layer's inputs are lost", _EXPORT),
    Kind.NONFINITE_VALUES: About(_E, "outputs become NaN", _EXPORT),
    Kind.ALL_ZERO: About(
        _W, "the layer gives nothing: so look files whose middle was never written", "download this file again"
    ),
    Kind.BAD_KV_SCALE: About(_W, "servers take 1.0 in its place, or scale the cache by it", _EXPORT),
    Kind.MISSING_KV_SCALE: About(
        _W,
        "servers take 1.0 for the scales of the KV cache, and large keys and values are clipped",
        "calibrate it again",
    ),
    Kind.TENSOR_SCALES_DIFFER: About(
        _E,
        "servers fuse these weights and hold one tensor scale for all, so that some are scaled wrongly",
        "requantise the set: fp4conv convert SRC DST --to nvfp4 --repair",
    ),
    Kind.INPUT_SCALES_DIFFER: About(
        _W, "servers fuse these weights and take one input scale for all", "calibrate the set together"
    ),
    Kind.SET_IN_PART: About(_E, "servers fuse these weights and cannot hold some in four bits and some not", _EXPORT),
    Kind.MISSING_INPUT_SCALE: About(
        _E,
        "the config says that inputs are quantised, and their scale is not there",
        "write the scales with --input-scales, or say W4A16: fp4conv convert SRC DST --to nvfp4 --input-scales none",
    ),
    Kind.QUANTISED_BUT_IGNORED: About(
        _E,
        "the server takes a quantised layer for a dense one, and refuses its packed weight",
        "name modules in full in the ignore lists, as fp4conv convert SRC DST --to FORMAT does",
    ),
    Kind.DENSE_BUT_NOT_IGNORED: About(
        _E,
        "the server takes a dense layer for a quantised one, and does not find its scales",
        "name modules in full in the ignore lists, as fp4conv convert SRC DST --to FORMAT does",
    ),
    Kind.DENSE_EXPERTS: About(
        _E,
        "the server holds the experts of every layer in MXFP4, and has no place for dense ones",
        "quantise these too: fp4conv convert SRC DST --to mxfp4 --modules experts",
    ),
    Kind.TIED_HEAD_DIFFERS: About(
        _E,
        "programs that go by config.json compute with the embeddings in place of this head, others with the head",
        "say tie_word_embeddings false in config.json where this head is meant, else leave the head out",
    ),
    Kind.NO_QUANT_CONFIG: About(
        _E,
        "servers take the packed codes for dense weights, and refuse or misread them",
        _REWRITE,
    ),
    Kind.CLAIM_WITHOUT_CODES: About(
        _E, "servers look for scales that are not there", "remove quantization_config, or quantise the model"
    ),
    Kind.ALGORITHM_DIFFERS: About(_E, "one server reads one file, the next the other", _REWRITE),
    Kind.WRONG_ALGORITHM: About(_E, "servers choose a reader by it", _REWRITE),
    Kind.GROUP_SIZE_MISSING: About(_E, "servers guess the block length, or stop", _REWRITE),
    Kind.GROUP_SIZE_NESTED: About(
        _W,
        "readers of the flat form look for it at the top level",
        _BOTH_FORMS,
    ),
    Kind.GROUP_SIZE_NESTED_ONLY: About(
        _W,
        "readers of the flat form look for it at the top level, and no other file says it",
        _BOTH_FORMS,
    ),
    Kind.GROUP_SIZE_DIFFERS: About(_E, "one server reads one file, the next the other", _REWRITE),
    Kind.GROUP_SIZE_WRONG: About(_E, "servers cut the weights into other blocks than they have", _REWRITE),
    Kind.IGNORE_LISTS_DIFFER: About(_E, "one server reads one file, the next the other", _REWRITE),
    Kind.KV_CACHE_DIFFERS: About(_W, "one server reads one file, the next the other", _REWRITE),
    Kind.NESTED_ONLY: About(
        _W,
        "newer readers look for the flat form in config.json",
        _BOTH_FORMS,
    ),
    Kind.NESTED_WEIGHT_ONLY: About(
        _E,
        "servers know W4A16_NVFP4 from the flat form in config.json alone",
        _BOTH_FORMS,
    ),
    Kind.WILL_NOT_LOAD: About(_E, "the server does not load this kind of checkpoint", "convert it to another format"),
    Kind.NOT_AS_SOURCE: About(_N, "the conversion was lossy", "that is what four bits cost; see the figures"),
    Kind.SOURCE_MISMATCH: About(_E, "it was not made from this source, or not completely", "give its own source"),
    Kind.HINTS_DAMAGED: About(
        _E, "the way back to the bytes it had is lost, and who knows what else changed", "convert the original again"
    ),
}


@dataclass(frozen=True)
class Found:
    """One fault. `name`: the tensor, or `file`. `weight`: what it belongs to, under the name that fits any format.

    `places`: how many values or blocks are affected; 1 where that says nothing. `server`: the one that reads it so,
    where the fault is one of reading. `experts`: it is about an expert's weight.
    """

    kind: Kind
    found: str
    expected: str
    name: str | None = None
    file: str | None = None
    weight: str | None = None
    places: int = 1
    server: str | None = None
    experts: bool = False
