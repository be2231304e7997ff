"""Values as people put them into rows, for hypothesis."""

from hypothesis import strategies as st

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "\ud800", "[{"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "tool_calls", "text", "function"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
turn_values = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "?"]), "content": json_values})  # fmt: skip
