"""What torch.compile needs on a node, and the time it takes."""

import torch

from data_pipeline.errors import ConfigError


def compiler_problem() -> str | None:
    """Why no C++ compiler is found, which torch.compile calls in the first step; None if there is one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        return str(error)
    return None


def require_compiler() -> None:
    """Raise ConfigError if no C++ compiler is found."""
    if (problem := compiler_problem()) is not None:
        raise ConfigError(
            f"compile = true needs a C++ compiler on every node: {problem}. Install g++, set CXX, or set "
            "compile = false."
        )


def compile_seconds() -> float:
    """Seconds that this process has spent compiling so far."""
    spent: dict[str, float] = torch._dynamo.utils.calculate_time_spent()
    return spent.get("total_wall_time", 0.0)
