"""The plan: what merges over what, who set a field, what is refused, and TOML that comes back equal."""

import dataclasses

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from qcompress.errors import ConfigError
from qcompress.kinds import KINDS, WEIGHT_KINDS
from qcompress.plan.fields import FIELDS
from qcompress.plan.plan import TABLE_KINDS, Plan, load_plan, parse_plan
from qcompress.plan.resolve import resolve
from qcompress.plan.settings import Settings
from qcompress.plan.values import OneOf

KEYS = [field.name for field in FIELDS]

NET = [
    ("stem.weight", "conv"),
    ("stem.bias", "other"),
    ("layer1.dw.weight", "depthwise"),
    ("layer1.pw.weight", "conv"),
    ("rnn.bias_ih_l0", "other"),
    ("fc.weight", "linear"),
    ("fc.bias", "other"),
]


def legal(values):
    """Strategy for the legal values of a field, and None."""
    if isinstance(values, OneOf):
        return st.sampled_from([None, *values.values])
    return st.sampled_from([None, values.word]) | st.integers(values.low, values.high or 10**6)


SETTINGS = st.builds(Settings, **{field.name: legal(field.values) for field in FIELDS})
PLANS = st.builds(
    Plan,
    default=SETTINGS,
    kind=st.dictionaries(st.sampled_from([*WEIGHT_KINDS, "first", "last"]), SETTINGS),
    name=st.dictionaries(st.text(), SETTINGS),
)


def same(one, other):
    """Equal, and in the same order, which decides what wins."""
    return one == other and list(one.kind) == list(other.kind) and list(one.name) == list(other.name)


def bits_of(plan, tensors=tuple(NET)):
    return {t.name: t.bits for t in resolve(plan, tensors).compressed}


# --- the text


@given(PLANS)
def test_toml_comes_back_equal(plan):
    text = plan.to_toml()
    assert same(parse_plan(text), plan)
    assert parse_plan(text).to_toml() == text


@given(st.text())
def test_any_text_is_a_plan_or_a_config_error(text):
    for candidate in (text, f"version = 1\n{text}"):
        try:
            parse_plan(candidate)
        except ConfigError as e:
            assert str(e).startswith("plan")  # noqa: PT017


def test_the_format_is_the_one_of_the_documentation():
    plan = parse_plan(
        """
        version = 1
        [default]
        bits = 2
        scheme = "palette"
        rows_per_lut = "auto"
        [kind.depthwise]
        bits = 8
        rows_per_lut = 16
        [kind.last]
        bits = 4
        [name."layer1.*"]
        skip = true
        """
    )
    assert plan == Plan(
        default=Settings(bits=2, scheme="palette", rows_per_lut="auto"),
        kind={"depthwise": Settings(bits=8, rows_per_lut=16), "last": Settings(bits=4)},
        name={"layer1.*": Settings(skip=True)},
    )


def test_a_plan_is_read_from_a_file(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text('version = 1\n[name."größe.*"]\nbits = 3\n', encoding="utf-8")
    assert load_plan(path).name == {"größe.*": Settings(bits=3)}


# --- merging


def test_tables_merge_field_by_field_and_the_later_wins():
    plan = Plan(
        default=Settings(bits=2, rows_per_lut=64),
        kind={"conv": Settings(bits=3), "first": Settings(bits=8), "last": Settings(rows_per_lut=5)},
        name={"layer1.*": Settings(bits=5), "layer1.pw.*": Settings(bits=6)},
    )
    resolved = resolve(plan, NET)
    assert bits_of(plan) == {"stem.weight": 8, "layer1.dw.weight": 5, "layer1.pw.weight": 6, "fc.weight": 2}
    assert [t.rows_per_lut for t in resolved.compressed] == [64, 64, 64, 5]


def test_a_later_kind_table_wins_over_an_earlier_one_and_order_is_all_that_counts():
    one = Plan(default=Settings(bits=2), kind={"first": Settings(bits=8), "conv": Settings(bits=3)})
    other = Plan(default=Settings(bits=2), kind={"conv": Settings(bits=3), "first": Settings(bits=8)})
    assert bits_of(one)["stem.weight"] == 3
    assert bits_of(other)["stem.weight"] == 8


def test_a_kind_table_never_wins_over_a_name_table():
    plan = parse_plan('version = 1\n[name."fc.*"]\nbits = 7\n[kind.linear]\nbits = 1\n[default]\nbits = 2')
    assert bits_of(plan)["fc.weight"] == 7


def test_the_only_weight_is_the_first_and_the_last():
    plan = Plan(default=Settings(bits=2), kind={"first": Settings(bits=8), "last": Settings(bits=4)})
    assert bits_of(plan, [("a.bias", "other"), ("a.weight", "conv"), ("b.bias", "other")]) == {"a.weight": 4}


def test_flags_replace_the_default_table_only():
    plan = Plan(default=Settings(bits=2, rows_per_lut=8), kind={"depthwise": Settings(bits=8)})
    flagged = plan.with_flags(bits=3, scheme="palette")
    assert flagged.default == Settings(bits=3, rows_per_lut=8, scheme="palette")
    assert flagged.kind == plan.kind
    assert plan.with_flags() == plan
    assert Plan.from_flags(rows_per_lut="auto").default == Settings(rows_per_lut="auto")


def test_patterns_are_case_sensitive_and_match_a_tied_tensor_by_any_of_its_names():
    tied = ("embed.weight", "embedding", ("head.weight",))
    plan = Plan(default=Settings(bits=2), name={"head.*": Settings(bits=6)})
    assert bits_of(plan, [tied]) == {"embed.weight": 6}
    with pytest.raises(ConfigError, match=r"matches no tensor"):
        resolve(Plan(default=Settings(bits=2), name={"Head.*": Settings(bits=6)}), [tied])


# --- who set what, and what stays in float


def test_every_field_says_where_it_was_set(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        "# widths\nversion = 1\n\n[default]\nbits = 2\n\n[kind.first]  # the stem\nbits = 8\nrows_per_lut = 4\n\n"
        '[name."layer1.[dp]w.*"]\nbits = 3\n'
    )
    resolved = resolve(load_plan(path).with_flags(bits=4), NET)
    assert resolved["stem.weight"].origins == {
        "bits": f"{path}:8 [kind.first]",
        "rows_per_lut": f"{path}:9 [kind.first]",
        "scheme": "built-in default",
        "skip": "built-in default",
    }
    assert resolved["layer1.dw.weight"].origins["bits"] == f'{path}:12 [name."layer1.[dp]w.*"]'
    assert resolved["fc.weight"].origins["bits"] == "--bits"


@pytest.mark.parametrize(
    "text", ["version = 1\ndefault.bits = 2", "version = 1\ndefault = { bits = 2 }", "version = 1\n[default]\nbits=2"]
)
def test_other_ways_to_write_a_table_have_lines_too(text):
    line = text.count("\n") + 1
    assert resolve(parse_plan(text, "p"), NET)["fc.weight"].origins["bits"] == f"p:{line} [default]"


def test_a_plan_from_python_names_its_table():
    resolved = resolve(Plan(default=Settings(bits=2), name={"fc.*": Settings(bits=3)}), NET)
    assert resolved["stem.weight"].origins["bits"] == "[default]"
    assert resolved["fc.weight"].origins["bits"] == '[name."fc.*"]'


def test_every_tensor_that_stays_in_float_says_why():
    resolved = resolve(parse_plan('version = 1\n[default]\nbits = 2\n[name."layer1.*"]\nskip = true', "p"), NET)
    assert [t.name for t in resolved.tensors] == [name for name, _ in NET]
    assert {t.name: t.reason for t in resolved.tensors if t.settings is None} == {
        "stem.bias": "not a weight",
        "layer1.dw.weight": 'by plan (p:5 [name."layer1.*"])',
        "layer1.pw.weight": 'by plan (p:5 [name."layer1.*"])',
        "rnn.bias_ih_l0": "not a weight",
        "fc.bias": "not a weight",
    }


def test_skip_can_be_taken_back_by_a_stronger_table_and_needs_no_bits():
    plan = Plan(default=Settings(skip=True), name={"fc.*": Settings(skip=False, bits=4)})
    assert bits_of(plan) == {"fc.weight": 4}


def test_weights_left_in_float_are_stored_as_float16_where_a_plan_sets_it():
    by_name = {"fc.*": Settings(skip=True), "layer1.*": Settings(skip=False)}
    plan = Plan(default=Settings(skip="float16", bits=2), name=by_name)
    tensors = resolve(plan, NET).tensors
    assert [t.name for t in tensors if t.float16] == ["stem.weight"]
    assert [t.name for t in tensors if t.settings] == ["layer1.dw.weight", "layer1.pw.weight"]
    assert bits_of(plan.with_flags(bits=4)) == dict.fromkeys(["stem.weight", "layer1.dw.weight", "layer1.pw.weight"], 4)


def test_a_bare_state_dict_has_tensors_of_no_kind():
    tensors = [("a.weight", "unknown")]
    assert resolve(Plan(default=Settings(bits=2)), tensors)["a.weight"].reason == (
        "a bare state dict does not tell whether this is a weight; add --arch"
    )


# --- the resolved plan

TENSORS = st.lists(
    st.tuples(st.text("ab.*?[]!_", min_size=1, max_size=6), st.sampled_from(KINDS)), unique_by=lambda t: t[0]
)


@given(TENSORS, st.data())
def test_a_saved_plan_resolves_to_the_same_again(tensors, data):
    plan = Plan(
        default=Settings(bits=2),
        kind=data.draw(st.dictionaries(st.sampled_from([*WEIGHT_KINDS, "first", "last"]), SETTINGS)),
    )
    try:
        resolved = resolve(plan, tensors)
    except ConfigError as e:
        assert 'scheme = "uniform"' in str(e) or "vector_dim" in str(e) or "_size" in str(e)  # noqa: PT017
        reject()
    again = resolve(parse_plan(resolved.to_toml()), tensors)
    assert again.digest == resolved.digest
    assert [(t.name, t.settings, t.float16) for t in again.tensors] == [
        (t.name, t.settings, t.float16) for t in resolved.tensors
    ]


def test_a_saved_plan_says_the_usual_once_and_the_rest_by_name():
    plan = Plan(default=Settings(bits=2), kind={"depthwise": Settings(skip=True), "last": Settings(bits=8)})
    assert resolve(plan, NET).to_toml() == (
        'version = 1\n\n[default]\nbits = 2\nscheme = "palette"\nrows_per_lut = "auto"\nskip = false\n\n'
        '[name."layer1.dw.weight"]\nskip = true\n\n[name."fc.weight"]\nbits = 8\n'
    )


def test_the_digest_tells_float16_from_float32():
    digests = {
        resolve(Plan(default=Settings(bits=2), kind={"last": Settings(**last)}), NET).digest
        for last in ({}, {"skip": True}, {"skip": "float16"})
    }
    assert len(digests) == 3


def test_the_digest_is_of_what_happens_not_of_who_said_so():
    by_flag = resolve(Plan.from_flags(bits=2), NET)
    by_kinds = resolve(Plan(kind={kind: Settings(bits=2) for kind in WEIGHT_KINDS}), NET)
    others = [resolve(Plan.from_flags(bits=3), NET), resolve(Plan.from_flags(bits=2, rows_per_lut=4), NET)]
    assert by_flag.digest == by_kinds.digest
    assert len({by_flag.digest, *(other.digest for other in others)}) == 3


def test_a_model_without_weights_has_an_empty_plan():
    resolved = resolve(Plan.from_flags(bits=2), [("bias", "other")])
    assert resolved.compressed == ()
    assert resolved.to_toml() == "version = 1\n"


def test_activation_bits_are_said_only_where_they_are_given():
    plain = resolve(Plan.from_flags(bits=2), NET)
    assert plain.digest == "6-HQHKVubvb"  # as before there were any: users compare it with what their files say
    assert plain["fc.weight"].activation_bits is None
    assert "activation_bits" not in plain["fc.weight"].origins
    given = resolve(Plan.from_flags(bits=2, activation_bits=4), NET)
    assert given.digest != plain.digest
    assert given["fc.weight"].origins["activation_bits"] == "--activation-bits"
    assert [t.activation_bits for t in given.compressed] == [4, 4, 4, 4]
    assert given["fc.bias"].activation_bits is None
    assert given.to_toml() == (
        "version = 1\n\n[default]\nbits = 2\nactivation_bits = 4\n"
        'scheme = "palette"\nrows_per_lut = "auto"\nskip = false\n'
    )


def test_a_saved_plan_gives_activation_bits_to_no_one_else():
    plan = Plan(default=Settings(bits=2), kind={"conv": Settings(activation_bits=8), "first": Settings(skip=True)})
    wide = resolve(
        Plan(default=Settings(bits=2), kind={k: Settings(activation_bits=8) for k in ("conv", "linear")}), NET
    )
    for resolved in (resolve(plan, NET), wide):
        again = resolve(parse_plan(resolved.to_toml()), NET)
        assert [t.settings for t in again.tensors] == [t.settings for t in resolved.tensors]
    assert wide["layer1.dw.weight"].activation_bits is None


def test_the_scheme_of_each_tensor():
    plan = Plan(default=Settings(bits=4, rows_per_lut="auto"), kind={"last": Settings(scheme="uniform")})
    resolved = resolve(plan, NET)
    assert [t.scheme for t in resolved.compressed] == ["palette", "palette", "palette", "uniform"]
    again = resolve(parse_plan(resolved.to_toml()), NET)
    assert again.digest == resolved.digest


# --- what is refused


def test_a_uniform_grid_shares_no_palettes():
    plan = parse_plan('version = 1\n[default]\nbits = 4\nrows_per_lut = 16\n[kind.linear]\nscheme = "uniform"', "p")
    message = (
        r'^fc\.weight: rows_per_lut = 16 \(p:4 \[default\]\) applies to scheme "palette" or "auto" only, but scheme = '
        r'"uniform" \(p:6 \[kind\.linear\]\); set scheme = "palette" or "auto", or remove rows_per_lut \(or set it to '
        r'"auto" for weights of other schemes\)\.$'
    )
    with pytest.raises(ConfigError, match=message):
        resolve(plan, NET)
    with pytest.raises(ConfigError, match=r'rows_per_lut = 4 \(--rows-per-lut\) .* scheme = "uniform" \(--scheme\)'):
        resolve(Plan.from_flags(bits=4, rows_per_lut=4, scheme="uniform"), NET)
    allowed = dataclasses.replace(plan, kind={"linear": Settings(scheme="uniform", rows_per_lut="auto")})
    assert resolve(allowed, NET)["fc.weight"].scheme == "uniform"


def test_a_uniform_grid_has_more_than_one_bit():
    with pytest.raises(
        ConfigError,
        match=r'^stem\.weight: scheme = "uniform" \(--scheme\) needs bits in \[2, 8\], got bits = 1 \(--bits\); '
        r'set more bits, or scheme = "palette", which stores 1 bit as two values\.$',
    ):
        resolve(Plan.from_flags(bits=1, scheme="uniform"), NET)


BLOCKS = 'version = 1\n[default]\nbits = 4\nscheme = "uniform"\n'


def test_block_size_by_default_goes_to_those_that_can_have_it():
    tensors = [*NET, ("embed.weight", "embedding"), ("head.weight", "linear")]
    plan = parse_plan(f'{BLOCKS}block_size = 32\n[name."head.*"]\nscheme = "palette"')
    resolved = resolve(plan, tensors)
    wanted = {"fc.weight": 32, "embed.weight": 32}
    assert {t.name: t.block_size for t in resolved.compressed if t.block_size} == wanted
    assert "block_size" not in resolved["stem.weight"].origins
    again = resolve(parse_plan(resolved.to_toml()), tensors)
    assert again.digest == resolved.digest
    assert "block_size" not in resolve(plan, tensors).as_plan().default.given()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{BLOCKS}[kind.conv]\nblock_size = 16",
            r"stem\.weight: block_size = 16 \(p:6 \[kind\.conv\]\) applies to linear or embedding weights only, but "
            r"this one is conv; remove it, or set it in \[default\], where it is ignored for other weights\.",
        ),
        (
            f'{BLOCKS}[name."layer1.dw.*"]\nblock_size = 16',
            r"layer1\.dw\.weight: block_size = 16 \(p:6 .* this one is depthwise; remove it.*",
        ),
        (
            "version = 1\n[default]\nbits = 4\nblock_size = 32",
            r'fc\.weight: block_size = 32 \(p:4 \[default\]\) applies to scheme "uniform" or "auto" only, but scheme = '
            r'"palette" \(built-in default\); set scheme = "uniform" or "auto", or remove block_size\.',
        ),
    ],
)
def test_block_size_where_it_cannot_be_is_refused(text, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        resolve(parse_plan(text, "p"), NET)


def test_block_size_that_no_weight_can_have_is_refused():
    message = (
        r"^block_size = 32 \(--block-size\) has no effect: no linear or embedding weight uses scheme 'uniform' or "
        r"'auto'; remove it\.$"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(Plan.from_flags(bits=4, scheme="uniform", block_size=32), NET[:4])


def test_a_uniform_grid_has_no_table_of_any_type():
    plan = parse_plan('version = 1\n[default]\nbits = 4\nlut_dtype = "int8"\n[kind.linear]\nscheme = "uniform"', "p")
    message = (
        r'^fc\.weight: lut_dtype = "int8" \(p:4 \[default\]\) applies to scheme "palette" or "auto" only, but scheme = '
        r'"uniform" \(p:6 \[kind\.linear\]\); set scheme = "palette" or "auto", or remove lut_dtype \(or set it to '
        r'"float32" for weights of other schemes\)\.$'
    )
    with pytest.raises(ConfigError, match=message):
        resolve(plan, NET)
    allowed = dataclasses.replace(plan, kind={"linear": Settings(scheme="uniform", lut_dtype="float32")})
    assert [t.lut_dtype for t in resolve(allowed, NET).compressed] == ["int8", "int8", "int8", "float32"]


def test_a_saved_plan_gives_what_some_lack_to_no_one_else():
    plan = Plan(default=Settings(bits=2), kind={k: Settings(vector_dim=2) for k in ("conv", "depthwise")})
    resolved = resolve(plan, NET)
    again = resolve(parse_plan(resolved.to_toml()), NET)
    assert [t.settings for t in again.tensors] == [t.settings for t in resolved.tensors]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = = 1", r"p is not valid TOML: .*at line 1, column 11.*\."),
        (
            f"version = 1\n[default]\nbits = {'9' * 5000}",
            r"p is not valid TOML: an integer has too many digits\.",
        ),
        ("[default]\nbits = 2", r"p: version is missing; begin the plan with `version = 1`\."),
        ("\nversion = 2", r"p:2: version must be 1, got 2\."),
        ("version = true", r"p:1: version must be 1, got True\."),
        (
            "version = 1\n[defaults]",
            r"p:2: unknown key 'defaults'; known: version, default, kind, name, training\. Did you mean default\?",
        ),
        ("version = 1\nkind = 3", r"p:2: kind must hold tables like \[kind\.first\], got 3\."),
        ("version = 1\ndefault = 3", r"p:2: \[default\] must be a table of settings, got 3\."),
        ("version = 1\nkind.conv = 3", r"p:2: \[kind\.conv\] must be a table of settings, got 3\."),
        (
            "version = 1\n[kind.depthwize]\nbits = 2",
            rf"p:2 \[kind\.depthwize\]: unknown kind; known: {', '.join(TABLE_KINDS)}\. Did you mean depthwise\?",
        ),
        (
            "version = 1\n[kind.other]\nbits = 2",
            r"p:2 \[kind\.other\]: not a weight; remove the table, or set "
            r"nothing in it but skip = true\.",
        ),
        (
            'version = 1\n[kind.other]\nskip = "float16"',
            r"p:2 \[kind\.other\]: not a weight; remove the table, or set "
            r"nothing in it but skip = true\.",
        ),
        (
            'version = 1\n[kind.first]\nskip = "float8"',
            r"p:3 \[kind\.first\] skip must be true, false or 'float16', got 'float8'\. Did you mean float16\?",
        ),
        (
            "version = 1\n\n[default]\nbit = 2",
            rf"p:4 \[default\] bit: unknown key; known: {', '.join(KEYS)}\. Did you mean bits\?",
        ),
        ("version = 1\n[default]\nbits = 9", r"p:3 \[default\] bits must be an integer in \[1, 8\], got 9\."),
        ("version = 1\n[default]\nbits = 2.0", r"p:3 \[default\] bits must be an integer in \[1, 8\], got 2\.0\."),
        ('version = 1\n[default]\nbits = "2"', r"p:3 \[default\] bits must be an integer in \[1, 8\], got '2'\."),
        ("version = 1\n[default]\nbits = true", r"p:3 \[default\] bits must be an integer in \[1, 8\], got True\."),
        (
            "version = 1\n[default]\nactivation_bits = 0",
            r"p:3 \[default\] activation_bits must be an integer in \[1, 8\], got 0\.",
        ),
        (
            'version = 1\n[kind.conv]\nscheme = "affine"',
            r"p:3 \[kind\.conv\] scheme must be 'palette', 'uniform' or 'auto', got 'affine'\.",
        ),
        (
            'version = 1\n[name."a"]\nrows_per_lut = 0',
            r"p:3 \[name\.\"a\"\] rows_per_lut must be 'auto' or an integer of at least 1, got 0\.",
        ),
        (
            "version = 1\n[default]\nblock_size = 1",
            r"p:3 \[default\] block_size must be an integer of at least 2, got 1\.",
        ),
        (
            'version = 1\n[default]\nlut_dtype = "float64"',
            r"p:3 \[default\] lut_dtype must be 'float32', 'float16' or 'int8', got 'float64'\. "
            r"Did you mean float16 or float32\?",
        ),
        ("version = 1\n[default]\nskip = 1", r"p:3 \[default\] skip must be true, false or 'float16', got 1\."),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_its_line(text, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse_plan(text, "p")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: the plan cannot be read: No such file or directory\.$"):
        load_plan(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"version = 1 # gr\xfc\xdfe")
    with pytest.raises(ConfigError, match=r"latin\.toml: the plan must be UTF-8 text, got byte 0xfc\.$"):
        load_plan(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Settings(bits=9), r"Settings\.bits must be an integer in \[1, 8\], got 9\."),
        (
            lambda: Settings(bit=2),
            rf"Settings\.bit: unknown key; known: {', '.join(KEYS)}\. Did you mean bits\?",
        ),
        (lambda: Plan.from_flags(bits=9), r"--bits must be an integer in \[1, 8\], got 9\."),
        (
            lambda: Plan.from_flags(rows_per_lut=0),
            r"--rows-per-lut must be 'auto' or an integer of at least 1, got 0\.",
        ),
        (
            lambda: Plan().with_flags(scheme="affine"),
            r"--scheme must be 'palette', 'uniform' or 'auto', got 'affine'\.",
        ),
        (lambda: Plan.from_flags(activation_bits=9), r"--activation-bits must be an integer in \[1, 8\], got 9\."),
        (
            lambda: Plan(kind={"convs": Settings()}),
            r"\[kind\.convs\]: unknown kind; known: .* Did you mean conv or .*\?",
        ),
    ],
)
def test_from_python_and_from_flags_the_words_are_the_same(call, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        call()


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(bits=2).bits = 3


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("fc.weigth", r" Did you mean fc\.weight or"),
        ("layer.*", r" Did you mean layer1\.\* or"),
        ("zzz", r" Legal names are stem\.weight, stem\.bias, layer1\.dw\.weight …"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern, near):
    plan = parse_plan(f'version = 1\n[name."{pattern}"]\nbits = 2', "p")
    wanted = rf"matches no tensor of this model\.{near}.* `qcompress inspect MODEL` lists the legal names\.$"
    with pytest.raises(ConfigError, match=wanted) as caught:
        resolve(plan, NET)
    assert str(caught.value).startswith(f'p:2 [name."{pattern}"] matches no tensor')


@pytest.mark.parametrize("given", [{"bits": 4}, {"skip": "float16"}])
def test_a_pattern_that_matches_only_what_is_never_compressed_is_refused(given):
    plan = Plan(default=Settings(bits=2), name={"*.bias": Settings(**given)})
    with pytest.raises(
        ConfigError,
        match=r'^\[name\."\*\.bias"\] matches no weight that can be compressed; stem\.bias: not a weight\. '
        r"`qcompress inspect MODEL` lists the legal names\.$",
    ):
        resolve(plan, NET)
    resolve(Plan(default=Settings(bits=2), name={"*.bias": Settings(skip=True)}), NET)


def test_weights_without_bits_are_refused():
    wanted = r"bits is unset; add --bits N \(1 to 8\), or set bits in a plan \(--plan FILE\)\.$"
    with pytest.raises(ConfigError, match=rf"^stem\.weight and 3 more weights: {wanted}"):
        resolve(Plan(), NET)
    with pytest.raises(ConfigError, match=rf"^fc\.weight: {wanted}"):
        resolve(Plan(), [("fc.weight", "linear")])


def test_kind_tables_on_a_bare_state_dict_are_refused():
    plan = parse_plan("version = 1\n[default]\nbits = 2\n[kind.first]\nbits = 8", "p")
    with pytest.raises(
        ConfigError,
        match=r"^p:4 \[kind\.first\]: a bare state dict does not tell the kinds of its layers; add --arch, or use "
        r'\[name\."PATTERN"\] tables\.$',
    ):
        resolve(plan, [("a.weight", "unknown")])
