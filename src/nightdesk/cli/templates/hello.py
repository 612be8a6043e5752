"""A task of your own. `type: my_desk.hello` in desk.yaml finds the one Task of this file."""

from decimal import Decimal

from nightdesk import Task, TaskContext


class HelloContext(TaskContext, kw_only=True):
    """What the task still knows after `kill -9`; its fields are keys of desk.yaml."""

    symbol: str
    venue: str
    seen: int = 0
    highest: Decimal = Decimal(0)


class HelloTask(Task[HelloContext]):
    """Remember the highest bid."""

    context_class = HelloContext

    async def _handle_executing(self) -> None:
        quote = self.desk.price(self.context.symbol, self.context.venue)
        if quote is not None:
            self.evolve_context(
                seen=self.context.seen + 1, highest=max(self.context.highest, quote.bid)
            )
        self.wait(1.0)
