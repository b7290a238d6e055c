"""Alembic migrations of the tables of `forecasting.store`; `forecasting.schema` runs them."""
