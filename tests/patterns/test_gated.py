"""Linear attention with gates, and the gated delta rule, as a backend."""

import pytest
import torch
from conftest import fresh

import effattn
from effattn.conformance import inputs
from effattn.errors import Unsupported
