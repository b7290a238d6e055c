"""Scores, probations, costs and the audit, which can only be added to."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_KEPT = "the audit is append-only"


def upgrade() -> None:
    """Forward."""
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "kind",
            sa.String(length=32),
            nullable=False,
            comment="such as alias, trigger, skip, approval",
        ),
        sa.Column("subject", sa.String(length=64), nullable=False, comment="forecaster or symbol"),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("who", sa.String(length=200), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    with op.batch_alter_table("audit", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_audit_subject"), ["subject"], unique=False)
    op.create_table(
        "costs",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column(
            "flow", sa.String(length=32), nullable=False, comment="flow, or step of a replay"
        ),
        sa.Column("flow_run_id", sa.String(length=36), nullable=False),
        sa.Column("symbol", sa.String(length=64), nullable=False),
        sa.Column("as_of", sa.Date(), nullable=False),
        sa.Column(
            "policy", sa.String(length=32), nullable=False, comment="of a replay; else empty"
        ),
        sa.Column(
            "outcome", sa.String(length=16), nullable=False, comment="what it came to; failed"
        ),
        sa.Column("wall_seconds", sa.Float(), nullable=False),
        sa.Column(
            "cpu_seconds", sa.Float(), nullable=False, comment="of the process and its children"
        ),
        sa.Column("bytes", sa.BigInteger(), nullable=False, comment="that the home grew by"),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("costs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_costs_started_at"), ["started_at"], unique=False)
    op.create_table(
        "market_days",
        sa.Column("symbol", sa.String(length=32), nullable=False),
        sa.Column("day", sa.Date(), nullable=False, comment="session whose daily round is done"),
        sa.Column(
            "prices_md5", sa.String(length=64), nullable=False, comment="dataset of the round"
        ),
        sa.Column("flow_run_id", sa.String(length=36), nullable=False),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("symbol", "day"),
    )
    op.create_table(
        "probations",
        sa.Column(
            "id", sa.String(length=36), nullable=False, comment="of the promotion that began it"
        ),
        sa.Column("forecaster", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column(
            "previous", sa.Integer(), nullable=False, comment="version that is scored beside it"
        ),
        sa.Column("started", sa.Date(), nullable=False, comment="market day of the promotion"),
        sa.Column(
            "days", sa.Integer(), nullable=False, comment="market days that it is watched for"
        ),
        sa.Column(
            "state",
            sa.String(length=16),
            nullable=False,
            comment="watching|passed|rolled-back|superseded",
        ),
        sa.Column("evidence", sa.JSON(), nullable=False, comment="as of the last look"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("probations", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_probations_forecaster"), ["forecaster"], unique=False)
    op.create_table(
        "scores",
        sa.Column("symbol", sa.String(length=32), nullable=False),
        sa.Column("as_of", sa.Date(), nullable=False, comment="day on which it was known"),
        sa.Column("forecaster", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column(
            "name",
            sa.String(length=64),
            nullable=False,
            comment="what is measured, such as crps_bp",
        ),
        sa.Column(
            "horizon",
            sa.Integer(),
            nullable=False,
            comment="trading days ahead; 0: of no one horizon",
        ),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("symbol", "as_of", "forecaster", "version", "name", "horizon"),
    )
    with op.batch_alter_table("checks", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column(
                "alarmed",
                sa.Boolean(),
                nullable=True,
                comment="whether it was told; None: before that",
            )
        )
    with op.batch_alter_table("retrains", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("cpu_seconds", sa.Float(), nullable=True, comment="spent; None while it runs")
        )
    _keep_audit()


def _keep_audit() -> None:
    """What is in the audit stays as it was written, whoever is at the database."""
    if op.get_context().dialect.name == "sqlite":
        for what in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{what.lower()} BEFORE {what} ON audit "
                f"BEGIN SELECT RAISE(ABORT, '{_KEPT}'); END"
            )
        op.execute(  # REPLACE deletes without the trigger of a deletion
            "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
            "WHEN EXISTS (SELECT 1 FROM audit WHERE number = NEW.number) "
            f"BEGIN SELECT RAISE(ABORT, '{_KEPT}'); END"
        )
        return
    op.execute(
        "CREATE FUNCTION perennial_audit_kept() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_KEPT}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION perennial_audit_kept()"
    )
