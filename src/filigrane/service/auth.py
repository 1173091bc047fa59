"""Who asks, and whether they may: what routes say of it.

A route says `who: Annotated[Principal, Depends(require(Role.KEY_ADMIN))]`. No token or a bad one is
401, a missing role 403 that names it, another tenant's thing 404: the tenant comes from the token
only, so that nobody can ask on behalf of another.
"""

from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase

from filigrane.keys import _Secret
from filigrane.service.problems import Problem, no_token, unauthorized

if TYPE_CHECKING:
    from filigrane.service.office import Office
    from filigrane.store.records import Principal, Role

__all__ = ["Require", "bearer", "check_roles", "office_of", "optional", "require"]


class Require(SecurityBase):
    """A dependency that answers with the principal, or raises 401 or 403.

    roles: any one of them is enough; none: whoever has a token. An instance is awaited in the event
    loop: a known token costs no thread.
    """

    def __init__(self, roles: frozenset["Role"], *, needed: bool = True) -> None:
        self.model = HTTPBearerModel(
            description="An API token (`filigrane access token`) or a JWT of the identity provider."
        )
        self.scheme_name = "bearer"
        self._roles = roles
        self._needed = needed

    async def __call__(self, request: Request) -> "Principal | None":
        """The principal of a request; None only where no token is needed and none was shown."""
        token = bearer(request)
        if token is None:
            if self._needed:
                raise no_token()
            return None
        office = office_of(request)
        principal = await office.gatekeeper.principal(token)
        check_roles(principal, self._roles)
        return principal


def require(*roles: "Role") -> Require:
    """A dependency: whoever has one of these roles (with none named: a valid token)."""
    return Require(frozenset(roles))


def optional(*roles: "Role") -> Require:
    """A dependency: None without a token; with one, as `require`."""
    return Require(frozenset(roles), needed=False)


def check_roles(principal: "Principal", roles: frozenset["Role"]) -> None:
    """Raise 403, naming what is missing, unless the principal has one of the roles."""
    if roles and roles.isdisjoint(principal.roles):
        names = sorted(str(role) for role in roles)
        raise Problem(
            403,
            "role",
            f"This needs the role {' or '.join(names)}, which your token does not have; a tenant "
            "admin can issue one that does.",
            more={"missing_roles": names},
        )


def office_of(request: Request) -> "Office":
    """The office of the process (for routes: `Depends(office_of)` costs a thread; call it)."""
    office: Office = request.app.state.office
    return office


def bearer(request: Request) -> _Secret[str] | None:
    """The bearer token of a request; None without a header. Raises 401 for other schemes."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise unauthorized("Authorization must be Bearer and a token.")
    return _Secret(token.strip())
