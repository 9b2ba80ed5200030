"""Reading order: columns, headings between them, tables row by row, paragraphs."""

from operators.reading_order import Box, group_lines, reading_order


def lines(left: float, top: float, width: float, count: int, *, pitch: float = 25, height: float = 20) -> list[Box]:
    return [Box(left, top + n * pitch, left + width, top + n * pitch + height) for n in range(count)]


def test_no_lines_give_no_groups() -> None:
    assert group_lines([]) == []


def test_two_columns_are_read_one_after_the_other() -> None:
    boxes = [*lines(50, 100, 300, 6), *lines(400, 93, 300, 6)]
    assert reading_order(boxes) == list(range(12))


def test_full_width_lines_divide_columns_into_bands() -> None:
    heading, left, right = lines(50, 10, 650, 2), lines(50, 100, 300, 4), lines(400, 95, 300, 4)
    middle, left_below, right_below = lines(50, 230, 650, 1), lines(50, 300, 300, 4), lines(400, 300, 300, 4)
    boxes = [*heading, *left, *right, *middle, *left_below, *right_below]
    shuffled = boxes[::-1]
    assert [shuffled[n] for n in reading_order(shuffled)] == boxes


def test_a_short_line_goes_with_the_full_width_text_it_stands_nearer_to() -> None:
    heading = lines(50, 10, 650, 2)
    short = Box(50, 60, 150, 80)
    left, right = lines(50, 120, 300, 4), lines(400, 120, 300, 4)
    title = Box(50, 262, 200, 282)
    below = lines(50, 287, 650, 2)
    boxes = [*heading, short, *left, *right, title, *below]
    assert reading_order(boxes) == list(range(len(boxes)))


def test_three_columns() -> None:
    boxes = [*lines(50, 100, 200, 5), *lines(290, 105, 200, 5), *lines(530, 98, 200, 5)]
    assert reading_order(boxes) == list(range(15))


def test_boxes_that_reach_into_a_narrow_gutter_are_still_columns() -> None:
    boxes = [*lines(50, 100, 312, 5), *lines(355, 100, 300, 5)]
    assert reading_order(boxes) == list(range(10))


def test_a_table_is_read_row_by_row_in_one_group() -> None:
    boxes = [
        box
        for row in range(5)
        for box in (
            Box(50, row * 30, 110, row * 30 + 20),
            Box(200, row * 30, 240, row * 30 + 20),
            Box(400, row * 30, 480, row * 30 + 20),
        )
    ]
    [group] = group_lines(boxes)
    assert group.rows == tuple((n, n + 1, n + 2) for n in range(0, 15, 3))


def test_an_indent_and_a_wide_gap_begin_paragraphs() -> None:
    boxes = [*lines(50, 0, 600, 3), Box(90, 75, 650, 95), *lines(50, 100, 600, 2), *lines(50, 200, 600, 2)]
    assert [len(group.rows) for group in group_lines(boxes)] == [3, 3, 2]


def test_items_begin_groups_and_their_hanging_lines_stay_with_them() -> None:
    boxes = [Box(50, 0, 650, 20), Box(75, 25, 300, 45), Box(50, 50, 650, 70), Box(75, 75, 500, 95)]
    assert [len(group.rows) for group in group_lines(boxes, item_lines={0, 2})] == [2, 2]


def test_clearly_larger_type_is_a_header() -> None:
    boxes = [Box(50, 0, 500, 40), *lines(50, 80, 600, 6)]
    assert [group.is_header for group in group_lines(boxes)] == [True, False]


def test_vertical_lines_are_read_from_right_to_left() -> None:
    boxes = [Box(left, 50, left + 30, 500) for left in (50, 120, 190)]
    [group] = group_lines(boxes)
    assert group.rows == ((2,), (1,), (0,))
