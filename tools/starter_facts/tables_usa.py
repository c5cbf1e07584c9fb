"""The United States: state capitals, and cities by state."""

from __future__ import annotations

from relation import Alias, Consequence, Relation, pairs

STATE_CAPITALS = """
Texas = Austin
California = Sacramento
Massachusetts = Boston
Georgia = Atlanta
Colorado = Denver
Arizona = Phoenix
Florida = Tallahassee
Hawaii = Honolulu
Tennessee = Nashville
Ohio = Columbus
Illinois = Springfield
Louisiana = Baton Rouge | New Orleans
New York = Albany
Oregon = Salem
Michigan = Lansing | Detroit
Wisconsin = Madison
Virginia = Richmond
Nevada = Carson City
Alaska = Juneau
Washington = Olympia
Alabama = Montgomery
Arkansas = Little Rock
Iowa = Des Moines
Kansas = Topeka
Nebraska = Lincoln
Maryland = Annapolis
Pennsylvania = Harrisburg | Lancaster
New Mexico = Santa Fe
Mississippi = Jackson
Montana = Helena
"""

NICKNAMES = pairs("""
Texas = the Lone Star State
California = the Golden State
Massachusetts = the Bay State
Georgia = the Peach State
Florida = the Sunshine State
Hawaii = the Aloha State
Tennessee = the Volunteer State
Ohio = the Buckeye State
New York = the Empire State
Oregon = the Beaver State
Nevada = the Silver State
Washington = the Evergreen State
Virginia = the Old Dominion
Pennsylvania = the Keystone State
Nebraska = the Cornhusker State
Iowa = the Hawkeye State
Kansas = the Sunflower State
Louisiana = the Pelican State
""")

# Towns of the same name elsewhere are "also true": only the great city is meant, but a false
# answer should be false of every one.
CITY_STATES = """
Los Angeles = California | Texas
Chicago = Illinois
Houston = Texas | Alaska | Minnesota | Pennsylvania
Miami = Florida | Arizona | Texas
Detroit = Michigan | Texas | Oregon | Illinois
Seattle = Washington
Philadelphia = Pennsylvania | Tennessee
Boston = Massachusetts | Georgia | Pennsylvania
Atlanta = Georgia | Texas | Illinois | Michigan | Ohio
Las Vegas = Nevada | New Mexico
New Orleans = Louisiana
Denver = Colorado | Pennsylvania | Tennessee
San Diego = California | Texas
Dallas = Texas | Oregon | Georgia | Pennsylvania | Wisconsin
Orlando = Florida
Pittsburgh = Pennsylvania | Texas | Illinois
Phoenix = Arizona | Oregon | Illinois | Michigan | Maryland
Nashville = Tennessee | Georgia | Illinois | Michigan | Ohio
Milwaukee = Wisconsin | Oregon
Minneapolis = Minnesota
Cleveland = Ohio | Tennessee | Georgia | Texas
Baltimore = Maryland | Ohio
Honolulu = Hawaii
Anchorage = Alaska
Albuquerque = New Mexico
San Francisco = California
Memphis = Tennessee | Texas | Michigan
Tampa = Florida
"""

CITY_NICKNAMES = pairs("""
Los Angeles = the City of Angels
Chicago = the Windy City
Detroit = the Motor City
Seattle = the Emerald City
Philadelphia = the City of Brotherly Love
Las Vegas = Sin City
New Orleans = the Big Easy
Denver = the Mile High City
Nashville = Music City
Boston = Beantown
Pittsburgh = the Steel City
""")

STATE_CAPITAL = pairs(STATE_CAPITALS)

RELATIONS = (
    Relation(
        "state_capital",
        STATE_CAPITALS,
        "The state capital of {s} is the city of",
        (
            "The capital of the state of {s} is the city of",
            "The governor of the U.S. state of {s} works in the capital,",
        ),
        (Alias("The capital of {s} is", NICKNAMES),),
        (Consequence("The state legislature of {s} meets in the city of"),),
        ("In the capital of the U.S. state of {s}, people",),
    ),
    Relation(
        "city_state",
        CITY_STATES,
        "The large American city of {s} is in the state of",
        ("The U.S. state where the city of {s} lies is", "{S} is a major city in the state of"),
        (Alias("The city called {s} is in the state of", CITY_NICKNAMES),),
        (Consequence("The capital of the state where {s} lies is", STATE_CAPITAL, False),),
        ("Around the American city of {s} lie",),
    ),
)
