import pydantic
import pytest

from streams.spec import Limits, TaskSpec, fits, is_dynamic, require_same


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x_shape": (0,)}, "x_shape"),
        ({"x_shape": (2.0,)}, "x_shape"),
        ({"x_shape": 3}, "x_shape"),
        ({"x_dtype": "bfloat16"}, "x_dtype"),
        ({"y": "label"}, "y is 'label'"),
        ({"ways": None}, "ways"),
        ({"ways": 0}, "ways"),
        ({"ways": True}, "ways"),
        ({"y_shape": (0,)}, "y_shape"),
        ({"y": "real"}, "ways is 3, but y is 'real'"),
        ({"query_share": 0.0}, "query_share"),
        ({"query_share": 1.0}, "query_share"),
        ({"query_share": float("nan")}, "query_share"),
        ({"labels": "all"}, "labels is 'all'"),
        ({"labels": "global", "y": "real", "ways": None}, "labels is 'global', but y is 'real'"),
    ],
)
def test_an_impossible_spec_is_refused_by_the_name_of_its_field(changes: dict, named: str) -> None:
    good = {"x_shape": (2,), "y": "class", "ways": 3}
    with pytest.raises(ValueError, match=named):
        TaskSpec(**{**good, **changes})


def test_a_list_from_a_config_file_becomes_a_tuple() -> None:
    assert TaskSpec(x_shape=[3, 28, 28], ways=5) == TaskSpec(x_shape=(3, 28, 28), ways=5)


def test_scalar_samples_and_real_targets_are_valid() -> None:
    assert TaskSpec(x_shape=(), y="real", y_shape=(2, 2)).ways is None


@pytest.mark.parametrize("name", [name for name in vars(Limits()) if not name.startswith("dead_letter")])
def test_a_limit_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 1"):
        pydantic.TypeAdapter(Limits).validate_python({name: 0})


def test_pydantic_validates_a_spec_with_the_declared_ranges() -> None:
    adapter = pydantic.TypeAdapter(TaskSpec)
    assert adapter.validate_python({"x_shape": [2], "ways": 3}) == TaskSpec(x_shape=(2,), ways=3)
    with pytest.raises(pydantic.ValidationError, match="less than 1"):
        adapter.validate_python({"x_shape": [2], "ways": 3, "query_share": 1.5})


def test_a_source_with_another_spec_is_refused_with_the_difference() -> None:
    offered = TaskSpec(x_shape=(2,), ways=3)
    require_same(TaskSpec(x_shape=(2,), ways=3, query_share=0.2), offered, "digits")
    with pytest.raises(ValueError, match=r"'digits' source .* ways = 3, but the run expects 4"):
        require_same(TaskSpec(x_shape=(2,), ways=4), offered, "digits")


def test_dead_letters_can_be_disabled_but_not_negative() -> None:
    assert Limits(dead_letters=0, dead_letter_bytes=0).dead_letters == 0
    with pytest.raises(ValueError, match="dead_letters is -1; it must be a whole number, 0 or more"):
        Limits(dead_letters=-1)


def test_dimensions_of_a_sample_can_be_open() -> None:
    spec = TaskSpec(x_shape=(3, -1, -1), ways=3)
    assert spec == TaskSpec(x_shape=[3, -1, -1], ways=3)
    assert is_dynamic(spec.x_shape)
    assert fits((3, 1, 9), spec.x_shape)
    for shape in ((3, 0, 9), (2, 4, 4), (3, 4), (3, 4, 4, 1)):
        assert not fits(shape, spec.x_shape)
    for shape in ((-2,), (0,), (True,), (-1.5,)):
        with pytest.raises(ValueError, match="x_shape"):
            TaskSpec(x_shape=shape, ways=3)
    with pytest.raises(ValueError, match="y_shape"):
        TaskSpec(x_shape=(2,), y="real", y_shape=(-1,))


def test_a_source_of_one_size_fits_a_run_with_open_dimensions() -> None:
    require_same(TaskSpec(x_shape=(3, -1, -1), ways=3), TaskSpec(x_shape=(3, 28, 28), ways=3), "digits")
    with pytest.raises(ValueError, match=r"x_shape = \(3, -1\), but the run expects \(3, 28\)"):
        require_same(TaskSpec(x_shape=(3, 28), ways=3), TaskSpec(x_shape=(3, -1), ways=3), "any")
