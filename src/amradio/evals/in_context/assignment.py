"""The assignment problem: rows to columns, one to one, with the highest sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def best_assignment(values: Tensor) -> Tensor:
    """Assign each row a column of its own such that the sum of values is highest.

    Shortest augmenting paths (Jonker and Volgenant 1987), n^3 steps of which n^2 are in Python.

    Args:
        values: [n, n], finite.

    Returns:
        int64 [n]: the column of each row. Among equally good assignments any may come.
    """
    costs = -values.double().cpu().numpy()
    n = len(costs)
    row_price, column_price = np.zeros(n), np.zeros(n)
    row_of = np.full(n, -1)  # of each column
    for start in range(n):
        # Dijkstra over columns from one free row, with reduced costs, until a free column is reached.
        distance, came_from = np.full(n, np.inf), np.full(n, -1)
        done = np.zeros(n, dtype=bool)
        row, column, reached = start, -1, 0.0
        while row >= 0:
            reduced = reached + costs[row] - row_price[row] - column_price
            closer = ~done & (reduced < distance)
            distance[closer], came_from[closer] = reduced[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            reached = distance[column]
            done[column] = True
            row = row_of[column]
        inner = done & (row_of >= 0)
        row_price[start] += reached
        row_price[row_of[inner]] += reached - distance[inner]
        column_price[done] -= reached - distance[done]
        while column >= 0:  # along the path, each column takes the row of the one before
            before = came_from[column]
            row_of[column] = start if before < 0 else row_of[before]
            column = before
    found = torch.empty(n, dtype=torch.int64)
    found[torch.from_numpy(row_of)] = torch.arange(n)
    return found
