"""The plan grammar: what parses, how it prints, and what every wrong plan is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.plans import Plan, PlanError, Policy, Stage, as_plan, words


@pytest.mark.parametrize(
    "text, printed",
    [
        ("none", "none"),
        ("full", "full"),
        ("dots", "dots"),
        ("full+dots", "dots"),
        ("uniform:4+dots", "uniform:4+dots"),
        ("full+offload:carry", "offload:carry"),
        ("14xfull/attention+names:q,k,v", "14xfull/attention+names:q,k,v"),
        ("names:q+names:k,q", "names:q,k"),
        (
            "3xnone/2xuniform:2/binomial:4+offload:carry",
            "3xnone/2xuniform:2/binomial:4+offload:carry",
        ),
        ("names:mlp.*,attn_*", "names:mlp.*,attn_*"),
        ("auto", "auto"),
    ],
)
def test_parses_and_prints(text, printed):
    plan = Plan.parse(text)
    assert str(plan) == printed
    assert Plan.parse(str(plan)) == plan
    assert hash(Plan.parse(str(plan))) == hash(plan)


def test_a_plan_is_data():
    assert Plan.parse("2xuniform:2+dots/log") == Plan(
        stages=(
            Stage(count=2, schedule="uniform", argument=2, policies=(Policy(kind="dots"),)),
            Stage(schedule="log"),
        )
    )


def test_bind_fills_the_last_count():
    plan = Plan.parse("14xfull/attention+names:q,k")
    assert plan.num_blocks is None
    bound = plan.bind(28)
    assert bound.num_blocks == 28
    assert str(bound) == "14xfull/14xattention+names:q,k"
    assert Plan.parse(str(bound)) == bound == bound.bind(28)


ERRORS = [
    ("sqrtt", "plan '>>sqrtt<<': 'sqrtt' is not a schedule or policy (did you mean 'sqrt'?)"),
    ("8xfull/unform:2", "plan '8xfull/>>unform:2<<': 'unform' is not a schedule or policy"),
    ("uniform:0", "uniform:0 asks for 0 segments; the least is uniform:1"),
    ("uniform:-3", "asks for -3 segments"),
    ("uniform", "uniform needs its number of segments, such as uniform:4"),
    ("uniform:", "after uniform: stands a whole number, not nothing"),
    ("binomial:x", "after binomial: stands a whole number, not 'x'"),
    ("binomial:1234567890123", "stands a whole number"),
    ("sqrt:3", "sqrt takes no number (given 3); those that do: uniform:N, every:N, binomial:N"),
    ("sqrt+dots", "sqrt takes offload:carry, not dots; full, uniform, every take dots"),
    ("none+dots", "none takes no policy, not dots"),
    ("log+offload:q", "log takes offload:carry, not offload:q"),
    ("full+sqrt", "'sqrt' is a schedule and stands first in its stage"),
    ("full+dotz", "plan 'full+>>dotz<<': 'dotz' is not a policy (did you mean 'dots'?)"),
    ("dots:q", "dots takes no names; did you mean names:q?"),
    ("names", "names needs names, such as names:q,k"),
    ("names:", "an empty name in names: is not valid"),
    ("names:q,,k", "an empty name in names:q,,k is not valid"),
    ("names:q k", "'q k' in names:q k is not valid"),
    ("names:carry", "'carry' is a reserved word, not a tag; did you mean offload:carry?"),
    ("names:q+offload:q", "name each value once"),
    ("names:q*+offload:qk", "name each value once"),
    ("dots+dots_no_batch", "contradict each other for matmuls with batch dimensions"),
    ("full/dots", "stage 'full' needs a count, such as 4xfull"),
    ("auto/full", "auto chooses the whole plan, so it stands alone"),
    ("4xfull/auto", "it stands alone"),
    ("0xfull", "a stage of 0 blocks; a count is at least 1"),
    ("3xuniform:4", "asks for 4 segments, but the stage has 3 blocks; the most is uniform:3"),
    ("", "an empty schedule or policy"),
    ("full//dots", "an empty schedule or policy"),
    ("4xfull/", "an empty schedule or policy"),
    ("full+", "an empty policy"),
    ("FULL", "'FULL' is not a schedule or policy"),
]


@pytest.mark.parametrize("text, message", ERRORS)
def test_wrong_plans_say_what_is_right(text, message):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_unknown_words_list_every_valid_one():
    with pytest.raises(PlanError) as caught:
        Plan.parse("checkpoint")
    for word in (*words.SCHEDULES, *words.POLICIES):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text, num_blocks, message",
    [
        ("5xfull", 8, "plan '5xfull' covers 5 blocks, the stack has 8"),
        ("5xfull/4xnone", 8, "covers 9 blocks, the stack has 8"),
        ("8xfull/dots", 8, "leaves no block for its last stage: 8 counted, the stack has 8"),
        ("uniform:9", 8, "asks for 9 segments, but the stage has 8 blocks"),
        ("every:9", 8, "asks for 9 blocks, but the stage has 8 blocks"),
        ("6xfull/binomial:3", 8, "asks for 3 carries, but the stage has 2 blocks"),
        ("full", 0, "a stack of 0 blocks"),
    ],
)
def test_bind_refuses_what_does_not_fit(text, num_blocks, message):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text).bind(num_blocks)
    assert message in str(caught.value)


@pytest.mark.parametrize("given_value", [None, 3, ["sqrt"], True])
def test_remat_is_a_plan_or_its_text(given_value):
    with pytest.raises(PlanError, match=r"a plan such as 'sqrt' or a jaxckpt\.Plan"):
        as_plan(given_value)
    with pytest.raises(PlanError, match="parsed from text"):
        Plan.parse(given_value)


NAMES = st.from_regex(r"[A-Za-z0-9_.\-*]{1,6}", fullmatch=True).filter(lambda name: name != "carry")


@st.composite
def stages(draw, last: bool):
    schedule = draw(st.sampled_from([name for name in words.SCHEDULES if name != "auto"]))
    count = draw(st.integers(1, 40)) if not last or draw(st.booleans()) else None
    word = words.SCHEDULES[schedule]
    argument = draw(st.integers(1, count or 40)) if word.argument else None
    policies = ()
    if word.policies == words.CARRY_ONLY and draw(st.booleans()):
        policies = (Policy(kind="offload", names=("carry",)),)
    elif word.policies == words.ALL_POLICIES:
        kinds = draw(st.sets(st.sampled_from(["dots", "attention", "names"])))
        kinds |= draw(st.sampled_from([set(), {"offload"}])) if "names" not in kinds else set()
        names = tuple(draw(st.lists(NAMES, min_size=1, max_size=3)))
        policies = tuple(
            Policy(kind=kind, names=names if words.POLICIES[kind].takes_names else ())
            for kind in kinds
        )
    return Stage(count=count, schedule=schedule, argument=argument, policies=policies)


@st.composite
def plans(draw):
    before = draw(st.lists(stages(last=False), max_size=3))
    return Plan(stages=(*before, draw(stages(last=True))))


@given(plans())
@settings(max_examples=300)
def test_every_plan_prints_what_parses_back(plan):
    assert Plan.parse(str(plan)) == plan
    if plan.num_blocks is not None:
        assert plan.bind(plan.num_blocks) == plan


@given(st.text(alphabet="fulnoeqrtsdamx:/+,*0123456789 .-_\n", max_size=30))
@settings(max_examples=500)
def test_any_text_parses_or_is_refused_in_one_line(text):
    try:
        plan = Plan.parse(text)
    except PlanError as error:
        assert str(error).isprintable()
    else:
        assert Plan.parse(str(plan)) == plan
